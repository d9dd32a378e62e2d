"""A load that would fill the disk fails before it starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Project = Callable[..., pytest.RunResult]

SMALL_DISK = """
    import collections, shutil
    usage = collections.namedtuple("usage", "total used free")
    shutil.disk_usage = lambda path: usage(1 << 40, 1 << 40, 257 << 20)
"""

TESTS = """
    import pytest
    @pytest.mark.strategy("offload")
    def test_offload(llm): pass
    def test_dense(llm): pass
"""


def test_an_offload_that_would_fill_the_disk_is_an_error_before_it_loads(
    pytester: pytest.Pytester, project: Project
) -> None:
    pytester.makeconftest(SMALL_DISK)
    pytester.makepyfile(TESTS)
    result = project("--llm-report=run.json")
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["*offload needs * MiB in *, where 257.00 MiB are free: nothing was loaded*"])


FULL = """
    import errno, os
    import transformers.core_model_loading as loading

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights.dat")

    loading.offload_and_maybe_resave_param = full
"""


def test_a_disk_that_fills_while_weights_are_offloaded_is_an_error_of_the_machine(
    pytester: pytest.Pytester, project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    pytester.makepyfile(full=FULL, test_it=TESTS)
    result = project("--llm-import=full")
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["*the disk is full: * No space left on device*weights.dat*"])
    assert not [path for path in tmp_path.iterdir() if "llmload" in path.name]
