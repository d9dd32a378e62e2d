"""What holds for the package as a whole: who imports what, who knows which names, errors of one base."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pytest_llmload.core
from pytest_llmload.quantisation.builtin import BUILTIN

CORE = Path(pytest_llmload.core.__file__).parent
PACKAGE = CORE.parent
#: Names that only a method's own file may know; any other code asks the method.
SCHEMES = {scheme.name for method in BUILTIN for scheme in method.schemes}
METHODS = {re.escape(name) for method in BUILTIN for name in (method.name, *method.file_methods, *method.packages)}
#: One of them, or a module of its package.
NAMED = re.compile(rf"({'|'.join(METHODS)})(\.\w[\w.]*)?")
#: The table of versions that baselines keep for every load names bitsandbytes, beside torch and peft.
TABLES = {"core/environment_entries.py"}

#: The files that import by a string, and whose names they import. A wall of layers that strings cross is not a wall.
BY_STRING = {
    "__init__.py": "the public names, each when it is first used",
    "cli/__init__.py": "the module of the command that runs",
    "core/references.py": "what users name",
    "process/load_imports.py": "libraries, and what users name",
    "process/server_imports.py": "what the pytest process names, before the server forks",
    "strategies/deepspeed.py": "the library",
}
IMPORTING = {"import_module", "__import__", "resolve_name"}


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


def imports_by_string(text: str) -> bool:
    called = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return any(getattr(each, "attr", getattr(each, "id", "")) in IMPORTING for each in called)


def test_a_module_is_imported_by_string_only_where_the_name_comes_from_outside() -> None:
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert {path for path, text in texts.items() if imports_by_string(text)} == set(BY_STRING)


@pytest.mark.parametrize(
    "line",
    [
        'importlib.import_module("pytest_llmload.host.loads.llm")',
        'import_module("x")',
        '__import__("x")',
        'pkgutil.resolve_name("x:y")',
    ],
)
def test_an_import_by_string_is_seen(line: str) -> None:
    assert imports_by_string(f"def f():\n    return {line}")
    assert not imports_by_string("import importlib\nimportlib.util.find_spec('x')")


def asked_by_name(text: str) -> Iterator[str]:
    """Yield the places where code compares with the name of a scheme, or names a method, its package or a module."""
    for node in ast.walk(ast.parse(text)):
        asked: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.match_case) and isinstance(node.pattern, ast.MatchValue):
            asked = [node.pattern.value]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith"):
            asked = node.args
        for each in asked:
            found = {str(part.value) for part in ast.walk(each) if isinstance(part, ast.Constant)}
            yield from (f"line {each.lineno}: {name}" for name in sorted(found & SCHEMES))
        if isinstance(node, ast.Constant) and NAMED.fullmatch(str(node.value)):
            yield f"line {node.lineno}: {node.value!r}"


def test_only_its_own_file_knows_a_quantisation_method_by_name() -> None:
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    others = {path: text for path, text in texts.items() if not path.startswith("quantisation/")}
    assert len(others) > 300
    asked = {path: list(asked_by_name(text)) for path, text in others.items() if path not in TABLES}
    assert {path: places for path, places in asked.items() if places} == {}


@pytest.mark.parametrize(
    "line",
    [
        'if job.spec.quant == "int8": pass',
        'if job.spec.quant in ("fp4", "nf4"): pass',
        'if "torchao-int8" != quant: pass',
        'if quant.startswith("quanto-int8"): pass',
        'match quant:\n    case "nf4": pass',
        'if "bitsandbytes" in sys.modules: pass',
        'functional = sys.modules.get("bitsandbytes.functional")',
        'LOGGERS = ("transformers", "bitsandbytes")',
    ],
)
def test_a_question_by_name_is_seen(line: str) -> None:
    assert len(list(asked_by_name(f'"""Of bitsandbytes\' int8."""\n{line}'))) >= 1


def test_what_is_not_such_a_question() -> None:
    assert list(asked_by_name('"""bitsandbytes."""\nstorage = {"int8": 1}\nif kind == "float16": pass\n')) == []


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
