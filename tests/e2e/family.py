"""A pytest run in a process of its own, and everything that it starts."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_llmload.system.process_tree import descendants


class EndedEarly(Exception):
    """A process was over before it had come to the point that was waited for."""


def wait_for(fifo: Path, process: subprocess.Popen[bytes]) -> None:
    """Return when the fifo was opened and closed at its other end. Raises EndedEarly."""
    reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    ended = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        for descriptor in (reading, ended):
            poll.register(descriptor, select.POLLIN)
        if reading not in dict(poll.poll()):
            raise EndedEarly
    finally:
        os.close(reading)
        os.close(ended)


def assert_nothing_outlives(
    pytester: pytest.Pytester, cache: Path, number: signal.Signals, check: Callable[[set[int]], None], *options: str
) -> None:
    """End a run by a signal once something in it has opened and closed ``started``; ``check`` sees its descendants."""
    started = pytester.path / "started"
    os.mkfifo(started)
    log = (pytester.path / "family.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "--llm-model=random:tiny-llama", "--llm-device=cpu", "-p", "no:randomly",
         f"--llm-cache-dir={cache}", *options],
        stdout=log, stderr=log,
        # A shell's background jobs ignore it, and so would all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        wait_for(started, process)
        family = set(descendants(process.pid, zombies=False))
        check(family)
        watched = [os.pidfd_open(pid) for pid in family]
        process.send_signal(number)
        process.wait(60)
        for descriptor in watched:
            readable, _, _ = select.select([descriptor], [], [], 60)
            assert readable, "a process outlives the session"
            os.close(descriptor)
    except EndedEarly:
        pytest.fail("the run ended before it had loaded:\n" + (pytester.path / "family.log").read_text())
    finally:
        process.kill()
        process.wait()
        log.close()
