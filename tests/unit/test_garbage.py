"""What the garbage collector looks at, in a load's process and in one of a user's own."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

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


def test_nothing_is_collected_while_it_is_deferred() -> None:
    with garbage.deferred():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_the_user_switched_off_stays_so() -> None:
    gc.disable()
    try:
        with garbage.deferred():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
