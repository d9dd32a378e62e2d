"""Show how far a load or a download is, while pytest waits for the process that does it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from pytest_llmload.core.units import format_bytes, format_seconds
from pytest_llmload.system import proc
from pytest_llmload.system.protocol import Message

#: The phase in which a process reads a checkpoint, and the one in which files come from the hub.
LOAD, DOWNLOAD = "load", "download"
#: The beginning of every line of progress.
PREFIX = "llmload: "


@dataclass(frozen=True)
class Step:
    """One load or download that is under way, and how far it is."""

    #: The load's name in test ids, or the model that is downloaded.
    title: str
    phase: str
    seconds: float
    #: Bytes that were read or downloaded, and their total; 0 if it is not known.
    done: int = 0
    expected: int = 0

    def __str__(self) -> str:
        sizes = f"{format_bytes(self.done)} of {format_bytes(self.expected)}, " if self.done else ""
        whole = f"{format_bytes(self.expected)}, " if self.phase == DOWNLOAD and not self.done else ""
        return f"{PREFIX}{self.title}: {self.phase.replace('_', ' ')}, {sizes}{whole}{format_seconds(self.seconds)}"


class Display(Protocol):
    """The place where progress is shown."""

    @property
    def interval(self) -> float:
        """Return the seconds between two updates; 0 if nothing is shown."""

    def show(self, step: Step) -> None:
        """Show a step in place of the previous one."""

    def clear(self) -> None:
        """Remove the shown step, since pytest's own output follows."""


class Watch:
    """A context that follows one request to a process and shows each step of it; it ends with the ``with`` block.

    It observes the process from outside, so that it does not affect what is measured of the load.
    """

    def __init__(self, display: Display, title: str, expected: int = 0, pid: int = 0) -> None:
        self._display = display
        self._title = title
        self._expected = expected
        self._begin = time.monotonic()
        self._phase = "start"
        #: Reads how many bytes have come so far, by each way in which they may come.
        self._count: Callable[[], tuple[int, ...]] = (lambda: proc.read_from_files(pid)) if pid else (lambda: ())
        self._from: tuple[int, ...] | None = None
        self.interval = display.interval

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._display.clear()

    def entered(self, message: Message) -> None:
        """Note that the process has entered a phase; the next update shows it, unless it is soon over."""
        if not self.interval:
            return
        self._phase = str(message["phase"])
        if self._phase == DOWNLOAD:
            folder = Path(message["folder"])
            self._expected, self._count = int(message["expected"]), lambda: (_size(folder),)
        self._from = self._counted() if self._phase in (LOAD, DOWNLOAD) else None
        if self._phase == DOWNLOAD:
            self.look()

    def look(self) -> None:
        """Show how far the process is."""
        pairs = zip(self._counted(), self._from or (), strict=False)
        done = max((now - before for now, before in pairs), default=0)
        seconds = time.monotonic() - self._begin
        self._display.show(Step(self._title, self._phase, seconds, min(max(done, 0), self._expected), self._expected))

    def _counted(self) -> tuple[int, ...]:
        # The reply reports a process that has just ended.
        with contextlib.suppress(OSError):
            return self._count()
        return ()


def _size(folder: Path) -> int:
    """Return the bytes that a folder's files take on the disk: a download may reserve their size first."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir()) if folder.is_dir() else 0
