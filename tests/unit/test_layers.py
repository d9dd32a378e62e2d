"""What holds for the package as a whole: ``core/`` imports the standard library only, errors have one base."""

from __future__ import annotations

import ast
import re
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
def test_core_imports_the_standard_library_only(path: Path) -> None:
    assert foreign(path.read_text(encoding="utf-8")) == []


def test_any_package_from_outside_is_seen() -> None:
    text = "import json, yaml.nodes\nfrom pytest_llmload.host import llm\ndef f():\n    from attrs import define\n"
    assert foreign(text) == ["yaml.nodes", "pytest_llmload.host", "attrs"]


def test_every_public_error_has_one_base_and_the_packages_name() -> None:
    errors = [getattr(pytest_llmload, name) for name in pytest_llmload.__all__]
    errors = [each for each in errors if isinstance(each, type) and issubclass(each, Exception)]
    assert len(errors) > 15
    assert all(issubclass(each, pytest_llmload.LLMLoadError) for each in errors)
    assert {each.__module__ for each in errors} == {"pytest_llmload"}
    assert issubclass(pytest_llmload.MemoryRegressed, AssertionError)
    own = type("TheirError", (pytest_llmload.LoadError,), {"__module__": "ourapp"})
    assert own.__module__ == "ourapp"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", pytest_llmload.__version__)
