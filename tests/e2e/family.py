"""A pytest run that a test watches from outside, and everything that it starts."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from warm_template import Run, Template

from pytest_llmload.system.process_tree import descendants


class EndedEarly(Exception):
    """A process was over before it had come to the point that was waited for."""


Process = subprocess.Popen[bytes] | Run


def wait_for(fifo: Path, process: Process) -> None:
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


def start(folder: Path, cache: Path, *options: str, template: Template | None) -> Process:
    """Start pytest in ``folder``, which writes to ``log`` there: forked from a template, or as a user starts it.

    A forked run has two servers, for its loads and for the model's files.
    """
    arguments = ["--llm-model=random:tiny-llama", "--llm-device=cpu", "-p", "no:randomly", f"--llm-cache-dir={cache}"]
    arguments += options
    with (folder / "log").open("wb") as log:
        if template is not None:
            output = (log.fileno(), log.fileno())
            return template.popen(arguments, cwd=folder, environment=dict(os.environ), output=output, servers=2)
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", *arguments],
            cwd=folder,
            stdout=log,
            stderr=log,
            # A shell's background jobs ignore it, and so would all that they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def assert_nothing_outlives(
    pytester: pytest.Pytester,
    cache: Path,
    number: signal.Signals,
    check: Callable[[set[int]], None],
    *options: str,
    template: Template | None,
) -> None:
    """End a run by a signal once something in it has opened and closed ``started``; ``check`` sees its descendants."""
    started = pytester.path / "started"
    os.mkfifo(started)
    process = start(pytester.path, cache, *options, template=template)
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
        pytest.fail("the run ended before it had loaded:\n" + (pytester.path / "log").read_text())
    finally:
        process.kill()
        process.wait()
