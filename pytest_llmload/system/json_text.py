"""Read JSON of unknown origin: bounded in size, depth and digits, and printable.

Written by hand instead of with msgspec or cattrs: these add types to JSON, whereas each of our readers has its own
sentence that says which entry is wrong and what to do about it.
"""

from __future__ import annotations

import gc
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

#: Largest size in bytes of a file that is read: headers and indexes of the largest models have some 10 MiB.
LARGEST = 100 << 20
#: The most levels of nested objects and lists, and the most digits of a whole number.
_DEEPEST, _DIGITS = 64, 20
#: Half of a character (a lone surrogate): JSON can spell it, but no encoding can write it.
_HALF = re.compile("[\ud800-\udfff]")
_LONG = re.compile(rf"[0-9]{{{_DIGITS + 1}}}")
_SPELT_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class Unreadable(ValueError):
    """A text that is not JSON within this package's bounds; the message says what is wrong with it."""


def read_json(path: Path, most: int = LARGEST, brackets: int | None = None) -> Any:
    """Return the content of a JSON file of at most ``most`` bytes, and so many opening ``brackets``.

    Raises OSError, and Unreadable for anything else.
    """
    # Without O_NONBLOCK, opening a FIFO would wait until another process writes to it.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("is not a regular file")
        if status.st_size > most:
            raise Unreadable(f"has {status.st_size} bytes, but at most {most} are read")
        return parse(file.read(), brackets=brackets)


def parse(text: bytes | str, *, halves: bool = False, brackets: int | None = None) -> Any:
    """Return the value of a JSON text with at most so many opening ``brackets``.

    Raises Unreadable; ``halves`` accepts half characters, which logs may hold.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        opened = decoded.count("[") + decoded.count("{")
        if brackets is not None and opened > brackets:
            raise Unreadable(f"opens {opened} objects and lists, but at most {brackets} are read")
        # Calling a function for each number takes several times as long as json's own numbers.
        is_long = _LONG.search(decoded) is not None
        with _uncollected():
            found = json.loads(decoded, parse_int=_whole if is_long else None)
    except UnicodeDecodeError:
        raise Unreadable("is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise Unreadable(f"is not valid JSON (line {error.lineno}: {error.msg})") from None
    except RecursionError:
        raise Unreadable("is nested too deeply") from None
    without_halves = halves or not _may_have_halves(decoded)
    # So few brackets cannot nest too deeply, whatever long lists they hold.
    if not without_halves or opened > _DEEPEST:
        check_structure(found, halves=without_halves)
    return found


def _may_have_halves(text: str) -> bool:
    is_written = not text.isascii() and _HALF.search(text) is not None
    return is_written or ("\\u" in text and _SPELT_HALF.search(text) is not None)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector off: JSON has no cycles, and looking for some takes five times as long as reading."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise Unreadable(f"holds a whole number of {len(digits)} digits")
    return int(digits)


def check_structure(found: Any, *, halves: bool = False) -> None:
    """Raise Unreadable for data that is nested too deeply and, without ``halves``, for texts that cannot be written."""
    level: list[Any] = [found]
    depth = 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise Unreadable("is nested too deeply")
        if not halves:
            texts = (item for item in level if isinstance(item, str))
            keys = chain.from_iterable(item for item in level if isinstance(item, dict))
            if any(map(_HALF.search, chain(texts, keys))):
                raise Unreadable("holds half a character (a lone surrogate), which cannot be written")
        objects = [item for item in level if type(item) is dict]
        lists = [item for item in level if type(item) is list]
        level = [*chain.from_iterable(lists), *chain.from_iterable(map(dict.values, objects))]


def short(value: object, most: int = 40) -> str:
    """Return a value as errors quote it: printable, on one line, and cut to ``most`` characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=repr)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."
