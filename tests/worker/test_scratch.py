"""Folders of a load: what a killed load leaves is removed, and nothing else."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loads import load

from pytest_llmload.system.scratch import LOAD, LOGS, Scratch


def killed_with_a_folder(prefix: str, base: Path) -> Path:
    """The folder of a process that ended before it could remove it."""
    program = (
        "import os, sys; from pytest_llmload.system.scratch import Scratch; "
        "print(Scratch(sys.argv[1]).path, flush=True); os._exit(1)"
    )
    command = [sys.executable, "-c", program, prefix]
    killed = subprocess.run(command, env={**os.environ, "TMPDIR": str(base)}, capture_output=True, text=True)
    return Path(killed.stdout.strip())


def test_what_a_killed_load_left_behind_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = killed_with_a_folder(LOAD, tmp_path)
    (left / "files" / "weight.safetensors").write_bytes(b"x")
    unfinished = tmp_path / "llmload-scratch-unfinished"
    unfinished.mkdir()
    other = killed_with_a_folder(LOGS, tmp_path)
    alive = Scratch(LOAD)
    second = Scratch(LOAD)
    assert other.is_dir()
    Scratch(LOGS).close()
    assert not left.exists()
    assert alive.files.is_dir()
    assert unfinished.is_dir()
    for scratch in (alive, second, second):
        scratch.close()
    assert list(tmp_path.iterdir()) == [unfinished]


def test_a_folder_belongs_to_its_load_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    flock = fcntl.flock

    def another_comes_first(descriptor: int, operation: int) -> None:
        monkeypatch.setattr("fcntl.flock", flock)
        Scratch(LOAD).close()
        flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", another_comes_first)
    scratch = Scratch(LOAD)
    assert scratch.files.is_dir()
    scratch.close()
    assert list(tmp_path.iterdir()) == []


def test_weights_on_disk_live_as_long_as_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, loaded = load("tiny-mixtral", strategy="offload", measure=False)
    assert len(list(tmp_path.glob(f"{LOAD}*"))) == 1
    loaded.close()
    assert list(tmp_path.glob(f"{LOAD}*")) == []
