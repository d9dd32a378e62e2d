"""``core/`` imports the standard library only: whatever is not that, by whatever name."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pytest_llmload.core

CORE = Path(pytest_llmload.core.__file__).parent


def imported(text: str) -> Iterator[str]:
    """The modules that a file names in its imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def foreign(text: str) -> list[str]:
    return [
        name
        for name in imported(text)
        if name.partition(".")[0] not in sys.stdlib_module_names and not name.startswith("pytest_llmload.core")
    ]


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda path: path.stem)
def test_core_imports_the_standard_library_only(path):
    assert foreign(path.read_text(encoding="utf-8")) == []


def test_any_package_from_outside_is_seen():
    text = "import json, yaml.nodes\nfrom pytest_llmload.host import llm\ndef f():\n    from attrs import define\n"
    assert foreign(text) == ["yaml.nodes", "pytest_llmload.host", "attrs"]
