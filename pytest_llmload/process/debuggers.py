"""Tell users of a debugger in a load's process, which has no terminal, what they can do instead."""

from __future__ import annotations

import bdb
import os
import sys
from typing import Any

_NO_TERMINAL = (
    "a debugger cannot be used in the load's process, which has no terminal: --llm-isolation=inline loads in pytest's "
    "own process, where breakpoint() works"
)


def refuse_breakpoints() -> None:
    """Have ``breakpoint()`` raise an error that says what to do, unless the user's debugger needs no terminal.

    The user names such a debugger in PYTHONBREAKPOINT.
    """

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(_NO_TERMINAL)

    if os.environ.get("PYTHONBREAKPOINT", "") in ("", "pdb.set_trace"):
        sys.breakpointhook = refuse


def without_terminal(error: BaseException) -> BaseException:
    """Return the error that replaces that of a debugger which found its input closed; other exceptions unchanged."""
    if isinstance(error, bdb.BdbQuit) and sys.stdin is not None and not sys.stdin.isatty():
        return RuntimeError(_NO_TERMINAL).with_traceback(error.__traceback__)
    return error
