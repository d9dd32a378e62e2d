"""Show the progress of loads: a live line on a terminal, plain lines now and then elsewhere, nothing under ``-q``."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pytest_llmload.host.loads.progress import DOWNLOAD, PREFIX, Display, Step
from pytest_llmload.host.run.display import DISPLAY

#: Seconds between two updates of a live line, and of a plain one.
_LIVE, _PLAIN = 0.25, 1.0
#: Seconds of a load before its first plain line, and between two of them.
FIRST, EVERY = 10.0, 10.0


class Nothing:
    """A display that shows nothing."""

    interval = 0.0

    def show(self, step: Step) -> None:
        """Show nothing."""

    def clear(self) -> None:
        """Do nothing, since nothing is shown."""


def display_of(config: pytest.Config) -> Display:
    """Return the display on which a run shows progress; call it once all plugins are configured."""
    if DISPLAY in config.stash:
        return config.stash[DISPLAY]()
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is None or config.get_verbosity() < 0:
        return Nothing()
    with _uncaptured(config):
        is_terminal = sys.stdout.isatty()
    is_terminal = is_terminal and os.environ.get("TERM") not in (None, "", "dumb") and not os.environ.get("CI")
    # Without capturing, a test's own output may stand anywhere.
    if is_terminal and config.getoption("capture") != "no":
        return LiveLine(config)
    return PlainLines(config, reporter)


@contextlib.contextmanager
def _uncaptured(config: pytest.Config) -> Iterator[None]:
    """Give the terminal back for a moment, as pytest does for live logs."""
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture is not None else contextlib.nullcontext():
        yield


class LiveLine:
    """One line below pytest's own, which is overwritten, and removed before pytest writes again."""

    interval = _LIVE

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._is_shown = False

    def show(self, *steps: Step) -> None:
        """Write steps, one after the other, below the line that pytest is in the middle of."""
        width = self._config.get_terminal_writer().fullwidth
        first, *others = map(str, steps)
        text = " · ".join([first, *(other.removeprefix(PREFIX) for other in others)])
        self._write(text[: max(width - 1, 0)])
        self._is_shown = True

    def clear(self) -> None:
        """Empty the line."""
        if self._is_shown:
            self._write("")
            self._is_shown = False

    def _write(self, text: str) -> None:
        terminal = self._config.get_terminal_writer()
        column = terminal.width_of_current_line % max(terminal.fullwidth, 1) + 1
        with _uncaptured(self._config):
            # Down one line, erase it, write, and back to where pytest was.
            sys.stdout.write(f"\n\r\x1b[2K{text}\x1b[A\x1b[{column}G")
            sys.stdout.flush()


class PlainLines:
    """A line for each download, and for a load that takes long one every few seconds."""

    interval = _PLAIN

    def __init__(self, config: pytest.Config, reporter: Any) -> None:
        self._config = config
        self._reporter = reporter
        self._rhythm = Rhythm()

    def show(self, step: Step) -> None:
        """Write the step, if it is time for it."""
        if self._rhythm.is_due(step):
            with _uncaptured(self._config):
                self._reporter.ensure_newline()
                # xdist's dots are no line of a file, which pytest would end.
                terminal = self._config.get_terminal_writer()
                if terminal.width_of_current_line:
                    terminal.line()
                self._reporter.write_line(str(step))

    def clear(self) -> None:
        """Leave the lines: a log is not overwritten."""


class Rhythm:
    """The rhythm of plain lines: it decides when the next one is due."""

    def __init__(self) -> None:
        self._last = 0.0
        self._downloaded = ""

    def is_due(self, step: Step) -> bool:
        """Return whether to write a step: when a download begins, and every few seconds of a long step."""
        now = time.monotonic()
        begins = step.phase == DOWNLOAD and self._downloaded != step.title
        if not begins and (step.seconds < FIRST or now - self._last < EVERY):
            return False
        self._last = now
        self._downloaded = step.title if step.phase == DOWNLOAD else ""
        return True
