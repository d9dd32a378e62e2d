"""What the garbage collector looks at, in a load's process and in one of a user's own."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from pytest_llmload.system import garbage


class Kept:
    """An object that the collector lists."""


KEPT = Kept()


def _is_listed() -> bool:
    return any(found is KEPT for found in gc.get_objects())


def _in_a_load() -> list[bool]:
    garbage.freeze()
    seen = [_is_listed()]
    with garbage.existing_hidden():
        seen.append(_is_listed())
    seen.append(_is_listed())
    with garbage.all_listed():
        seen.append(_is_listed())
    return [*seen, _is_listed()]


def _in_a_users_process() -> list[bool]:
    gc.unfreeze()
    garbage._is_frozen = False
    seen = [_is_listed()]
    with garbage.existing_hidden():
        seen.append(_is_listed())
        with garbage.all_listed():
            seen.append(_is_listed())
    return [*seen, _is_listed()]


def _forked(call: Callable[[], list[bool]]) -> list[bool]:
    with ProcessPoolExecutor(1, get_context("fork")) as process:
        return process.submit(call).result()


def test_what_is_frozen_for_good_is_listed_on_request_only() -> None:
    assert _forked(_in_a_load) == [False, False, False, True, False]


def test_a_process_that_freezes_nothing_gets_all_its_objects_back() -> None:
    assert _forked(_in_a_users_process) == [True, False, True, True]


def test_garbage_is_collected_rarely_for_a_while_only() -> None:
    before = gc.get_threshold()
    with garbage.collected_rarely():
        assert gc.get_threshold()[0] == 10_000
    assert gc.get_threshold() == before


@pytest.mark.parametrize("own", [0, 50_000])
def test_a_collector_that_is_switched_off_or_rarer_stays_so(own: int) -> None:
    before = gc.get_threshold()
    gc.set_threshold(own)
    try:
        with garbage.collected_rarely():
            assert gc.get_threshold()[0] == own
    finally:
        gc.set_threshold(*before)
