"""A load that would fill the disk fails before it starts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Project = Callable[..., pytest.RunResult]

SMALL_DISK = """
    import collections, shutil
    usage = collections.namedtuple("usage", "total used free")
    shutil.disk_usage = lambda path: usage(1 << 40, 1 << 40, 257 << 20)
"""


def test_an_offload_that_would_fill_the_disk_is_an_error_before_it_loads(
    pytester: pytest.Pytester, project: Project
) -> None:
    pytester.makeconftest(SMALL_DISK)
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.strategy("offload")
        def test_offload(llm): pass
        def test_dense(llm): pass
        """
    )
    result = project("--llm-report=run.json")
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["*offload needs * MiB in *, where 257.00 MiB are free: nothing was loaded*"])
