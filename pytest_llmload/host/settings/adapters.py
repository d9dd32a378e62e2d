"""``--llm-adapter SPEC`` and ``lora(adapter=SPEC)``: the adapters of a run and their names on every machine."""

from __future__ import annotations

import re
from pathlib import Path

from pytest_llmload.core.paths import path_of
from pytest_llmload.core.quoting import quoted

RANDOM = "random"
#: How a directory below the root directory begins, which tells it from a hub id.
BELOW = "./"


def parse_adapter(text: object, base: Path, root: Path) -> str:
    """Return ``random``, a hub id, ``./directory/below/root`` or an absolute directory.

    Relative directories start at ``base``. Raises ValueError that says what is wrong and what to write.
    """
    if not isinstance(text, str) or not text:
        raise ValueError(f"{quoted(text)} is not an adapter: write a directory, a hub id or 'random'")
    if text == RANDOM:
        return text
    path = (base / path_of(text)).resolve()
    if path.is_dir():
        below = path.is_relative_to(root) and path != root
        return f"{BELOW}{path.relative_to(root).as_posix()}" if below else str(path)
    if text.startswith((".", "/", "~")):
        raise ValueError(f"{quoted(text)} is not a directory on this machine (looked at {quoted(str(path))})")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", text) is None or ".." in text:
        raise ValueError(f"{quoted(text)} is neither a directory on this machine nor a hub id such as 'org/adapter'")
    return text


def location(adapter: str, root: Path) -> str:
    """Return where this machine has an adapter that :func:`parse_adapter` named."""
    return str(root / adapter) if adapter.startswith(BELOW) else adapter
