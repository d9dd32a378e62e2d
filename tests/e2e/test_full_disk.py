"""A load that would fill the disk fails before it starts, and a disk that is full is told in one sentence."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_llmload.worker.checkpoints.resolve import resolve

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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small disk with the given options of a tmpfs."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if (done := subprocess.run(command, capture_output=True)).returncode:
            pytest.skip(f"this user may not mount a tmpfs: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


ON_CPU = ("--llm-device=cpu", "--llm-workload=1x8+3")


def fill(folder: Path) -> None:
    """Leave no byte free."""
    with (folder / "full").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def test_a_full_cache_disk_is_one_sentence_and_keeps_nothing_of_a_digest(
    pytester: pytest.Pytester, disk: Callable[[str], Path], checkpoint_cache: Path
) -> None:
    model = pytester.path / "model"
    shutil.copytree(resolve("random:tiny-llama", checkpoint_cache).path, model)
    cache = disk("size=1m")
    (cache / "digests").mkdir()
    fill(cache)
    pytester.makepyfile("def test_it(llm): pass")
    result = pytester.runpytest_subprocess(f"--llm-model={model}", f"--llm-cache-dir={cache}", *ON_CPU)
    # One is that of the test, and one that nothing was measured.
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines([f"cannot read the checkpoint {model} or keep its digest in {cache} *: No space *"])
    assert "None" not in result.stdout.str()
    assert not list((cache / "digests").iterdir())


def test_a_tmpdir_without_inodes_is_one_sentence(
    pytester: pytest.Pytester, disk: Callable[[str], Path], checkpoint_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One inode is the folder's own. One is free, for the file by which tempfile tries the folder.
    temporary = disk("size=1m,nr_inodes=3")
    (temporary / "taken").touch()
    monkeypatch.setenv("TMPDIR", str(temporary))
    pytester.makepyfile("def test_it(llm): pass")
    # Without -s, pytest itself could not start: it captures output in files there.
    options = ("-s", f"--llm-cache-dir={checkpoint_cache}", *ON_CPU)
    result = pytester.runpytest_subprocess("--llm-model=random:tiny-llama", *options)
    result.assert_outcomes(errors=2)
    text = result.stdout.str()
    assert f"cannot make a temporary folder: No space left on device ({temporary}" in text
    assert "Traceback" not in text
    assert [path.name for path in temporary.iterdir()] == ["taken"]
