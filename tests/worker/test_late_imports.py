"""Modules that are imported while a model loads are named: their time is the load's."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from loads import by_target, plain_loader, quick

from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.process.late_imports import imports_watched


def importing_loader(spec: LoadSpec) -> Any:
    importlib.import_module("imported_late.part")
    return plain_loader(spec)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "imported_late"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "part.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("imported_late", "imported_late.part"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("package")
def test_a_loader_that_imports_is_named() -> None:
    fields = by_target(f"{__name__}:importing_loader")
    note = "2 modules were imported during the load: imported_late, imported_late.part"
    assert note in quick("tiny-llama", **fields).notes
    assert not [note for note in quick("tiny-llama", **fields).notes if "imported during" in note]


@pytest.mark.usefixtures("package")
def test_what_is_there_or_is_not_found_was_not_imported() -> None:
    finders = list(sys.meta_path)
    with imports_watched() as late:
        importlib.import_module("json")
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("imported_late.missing")
    assert late == ["imported_late"]
    assert sys.meta_path == finders


def test_what_the_loader_put_before_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))

    class Theirs:
        def find_spec(self, *_: object) -> None: ...

    theirs = Theirs()
    with imports_watched():
        sys.meta_path.insert(0, theirs)
    assert sys.meta_path[0] is theirs
