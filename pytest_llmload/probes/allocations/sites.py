"""Lines of code that allocate, from a stack of Python frames."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from pytest_llmload.core.code_paths import INSTALLED, short_path

#: The most frames of a stack that are read.
DEPTH = 64
#: Packages whose lines are skipped: they allocate on behalf of the code to report, or belong to this package.
_INTERNAL = ("torch", "numpy", "pytest_llmload/process", "pytest_llmload/probes", "pytest_llmload/worker/model")
#: The folder of Python's own library: a thread of a pool begins there, and so does an import.
_STANDARD = sysconfig.get_paths()["stdlib"]


class Frame(NamedTuple):
    """One call of a stack."""

    file: str
    line: int
    #: Empty if only the line is known.
    function: str


def stack(frame: FrameType | None) -> tuple[Frame, ...]:
    """Return the calls that led to a frame, innermost first."""
    found: list[Frame] = []
    while frame is not None and len(found) < DEPTH:
        found.append(Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(found)


def site(frames: Iterable[Frame]) -> str:
    """Return the line that allocated: ``ourapp/serving.py:12 in load_model``.

    It is the innermost one outside torch, numpy and Python's own library. If that is a library's line, the user's line
    that called it follows.
    """
    known = [frame for frame in frames if not frame.file.startswith("<")]
    telling = [frame for frame in known if not _is_internal(frame.file)]
    if not telling:
        return _text(known[0]) if known else "a line that Python does not know"
    own = next((frame for frame in telling if not _is_installed(frame.file)), None)
    first = telling[0]
    return _text(first) if own is None or own is first else f"{_text(first)}, called from {_text(own)}"


def _text(frame: Frame) -> str:
    name = frame.function or _function(frame.file, frame.line)
    function = f" in {name}" if name else ""
    return f"{short_path(frame.file)}:{frame.line}{function}"


def _function(file: str, line: int) -> str:
    """Return the function that contains a line of a file; empty if there is none or the file cannot be read."""
    around = [(first, name) for first, last, name in _functions(file) if first <= line <= last]
    return max(around)[1] if around else ""


@cache
def _functions(file: str) -> tuple[tuple[int, int, str], ...]:
    """Return the first and last line and the name of each function of a file; none if it cannot be read."""
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ()
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return tuple((node.lineno, node.end_lineno or node.lineno, node.name) for node in functions)


@cache
def _is_installed(file: str) -> bool:
    return any(part in file for part in (*INSTALLED, "/pytest_llmload/")) or file.startswith((sys.base_prefix, "<"))


@cache
def _is_internal(file: str) -> bool:
    path = f"/{file}"
    is_standard = file.startswith(_STANDARD) and not any(folder in file for folder in INSTALLED)
    return is_standard or any(f"/{package}/" in path for package in _INTERNAL)
