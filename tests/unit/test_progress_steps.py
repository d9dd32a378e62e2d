"""Progress of loads: what a line says, when a plain one is due, and what a look at a process costs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pytest_llmload.host.loads.progress import DOWNLOAD, LOAD, Step, Watch
from pytest_llmload.host.run.progress import Rhythm
from pytest_llmload.system import proc


class Recorder:
    """A display that keeps what it was given."""

    interval = 0.1

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.clears = 0

    def show(self, step: Step) -> None:
        self.steps.append(step)

    def clear(self) -> None:
        self.clears += 1


def test_a_line_says_what_how_far_and_since_when() -> None:
    assert str(Step("m-nf4", LOAD, 12.3, 1 << 30, 6 << 30)) == "llmload: m-nf4: load, 1.00 GiB of 6.00 GiB, 12.30 s"
    assert str(Step("m-nf4", "import", 2.0, 0, 6 << 30)) == "llmload: m-nf4: import, 2.00 s"
    assert str(Step("org/m", DOWNLOAD, 0.5, 0, 6 << 30)) == "llmload: org/m: download, 6.00 GiB, 500.0 ms"


def test_bytes_that_a_process_reads_are_seen_from_outside(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(8 << 20))
    _, before = proc.read_from_files(os.getpid())
    assert len((tmp_path / "weights").read_bytes()) == 8 << 20
    mapped, read = proc.read_from_files(os.getpid())
    assert read - before >= 8 << 20
    assert mapped > 1 << 20
    recorder = Recorder()
    with Watch(recorder, "m-none", 4 << 20, os.getpid()) as watch:
        watch.entered({"phase": "import"})
        watch.look()
        watch.entered({"phase": LOAD})
        (tmp_path / "weights").read_bytes()
        watch.look()
    first, last = recorder.steps
    assert (first.phase, first.done) == ("import", 0)
    assert (last.phase, last.done, last.expected) == (LOAD, 4 << 20, 4 << 20)
    assert recorder.clears == 1


@pytest.mark.parametrize("came", [(900, 300), (400, 800)], ids=["mapped", "read"])
def test_what_comes_in_one_way_counts_however_much_came_in_the_other_before(
    came: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([(400, 300), came])
    monkeypatch.setattr(proc, "read_from_files", lambda pid: next(counts))
    recorder = Recorder()
    with Watch(recorder, "m", 1000, 7) as watch:
        watch.entered({"phase": LOAD})
        watch.look()
    assert [step.done for step in recorder.steps] == [500]


def test_a_download_is_followed_by_the_files_that_grow(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(bytes(1 << 20))
    recorder = Recorder()
    with Watch(recorder, "org/model") as watch:
        watch.entered({"phase": DOWNLOAD, "expected": 3 << 20, "folder": str(tmp_path)})
        (tmp_path / "weights.incomplete").write_bytes(bytes(2 << 20))
        watch.look()
    assert [(step.done, step.expected) for step in recorder.steps] == [(0, 3 << 20), (2 << 20, 3 << 20)]


def test_a_process_that_has_ended_is_no_error() -> None:
    recorder = Recorder()
    with Watch(recorder, "m", 1, 1 << 30) as watch:
        watch.entered({"phase": LOAD})
        watch.look()
    assert [step.done for step in recorder.steps] == [0]


def test_a_plain_line_is_due_for_a_download_and_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    rhythm = Rhythm()
    assert not rhythm.is_due(Step("m", LOAD, 9.9))
    assert rhythm.is_due(Step("m", LOAD, 10.0))
    now += 9.9
    assert not rhythm.is_due(Step("m", "generate", 19.9))
    now += 0.1
    assert rhythm.is_due(Step("m", "generate", 20.0))
    assert rhythm.is_due(Step("org/m", DOWNLOAD, 0.1))
    assert not rhythm.is_due(Step("org/m", DOWNLOAD, 0.2))


def test_a_look_costs_less_than_a_thousandth_of_the_time_between_two() -> None:
    begin = time.process_time()
    for _ in range(200):
        proc.read_from_files(os.getpid())
    assert (time.process_time() - begin) / 200 < 0.25e-3
