"""What keeps objects alive, by name."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llmload.probes.holders import holders
from pytest_llmload.system.garbage import all_listed

KEPT: list[Any] = []
BY_NAME: dict[str, Any] = {}


class Value:
    """An object that is held in several ways."""


class Owner:
    def __init__(self, value: Any) -> None:
        self.cache = value


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives, for each search through all objects, for how many it was made."""
    asked: list[int] = []
    search = gc.get_referrers

    def counted(*values: Any) -> list[Any]:
        asked.append(len(values))
        return search(*values)

    monkeypatch.setattr(gc, "get_referrers", counted)
    return asked


def test_each_holder_has_its_name_and_all_are_found_in_three_searches(
    monkeypatch: pytest.MonkeyPatch, searches: list[int]
) -> None:
    values = [Value() for _ in range(6)]
    owner = Owner(values[0])
    monkeypatch.setattr("test_holders.KEPT", [values[1]])
    monkeypatch.setattr("test_holders.BY_NAME", {"first": values[2]})
    monkeypatch.setattr("test_holders.MODEL", values[3], raising=False)
    nested = SimpleNamespace(states={"layer": [values[5]]})

    def reads() -> Any:
        return closed_over

    closed_over = values[4]
    with all_listed():
        found = holders(values)
    assert found == [
        "attribute cache of Owner",
        "the list test_holders.KEPT",
        "the dict test_holders.BY_NAME",
        "test_holders.MODEL",
        "a closure's variable",
        "an object that Python does not name",
    ]
    assert owner.cache is values[0]
    assert reads() is values[4]
    assert nested.states
    assert len(searches) <= 3
    assert searches[0] == 6


class Lazy(dict[str, Any]):
    """A dict that opens what it holds when it is asked for it."""

    def get(self, *_: object) -> Any:
        raise RuntimeError("the file is closed")

    items = get


def test_no_code_of_a_dicts_own_class_runs() -> None:
    value = Value()
    lazy = Lazy(weights=value)
    with all_listed():
        found = holders([value])
    assert found == ["key 'weights' of a dict"]
    assert lazy


def test_what_nobody_names_is_said_to_be_so() -> None:
    value = Value()
    with all_listed():
        found = holders([value])
    assert found == ["an object that Python does not name"]
    assert holders([]) == []
