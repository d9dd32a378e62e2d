"""Values as error messages quote them."""

from __future__ import annotations

#: Characters that are quoted: an option can have some hundred thousand.
_MOST = 120


def quoted(value: object) -> str:
    """Return the value's ``repr`` on one printable line, its end cut and counted."""
    text = printable(repr(value))
    rest = len(text) - _MOST
    return f"{text[:_MOST]}… ({rest} more characters)" if rest > 0 else text


def printable(text: str) -> str:
    """Return a text with escapes for what cannot be printed on one line."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
