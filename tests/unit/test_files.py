"""Replacing a file: the old text or the new one, and nothing beside it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_llmload.system.files import replace_text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.json"
    path.write_text("old")
    return path


def on_folders(error: int) -> Callable[[int], None]:
    """``os.fsync``, as a file system has it that raises for folders."""
    fsync = os.fsync

    def call(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(error, os.strerror(error))
        fsync(handle)

    return call


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folder_is_no_failure(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    monkeypatch.setattr(os, "fsync", on_folders(error))
    replace_text(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_disk_that_fails_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", on_folders(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        replace_text(path, "new")


def test_an_interrupt_leaves_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_text(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
