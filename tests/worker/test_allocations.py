"""Who did it: a planted kept copy and a planted transient are named by file, function and line."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from loads import job

from pytest_llmload.baselines.allocations import beside
from pytest_llmload.core.job import ALLOCATIONS
from pytest_llmload.core.results import KEPT, AllocationSite, LoadResult
from pytest_llmload.core.verdicts import REGRESSED, Comparison, MetricVerdict
from pytest_llmload.probes.allocations.gpu import timeline_of
from pytest_llmload.probes.allocations.sites import Frame, site
from pytest_llmload.probes.allocations.timeline import HeldBlock, Timeline, by_site
from pytest_llmload.process.measurement import measure
from pytest_llmload.reports import allocations

COPIES: list[Any] = []


class Cache:
    def __init__(self) -> None:
        self.blocks: dict[str, Any] = {}


CACHE = Cache()


def kept_tensor() -> None:
    COPIES.append(torch.ones(3 << 20, dtype=torch.uint8))


def kept_array() -> None:
    CACHE.blocks["x"] = np.ones(5 << 20, dtype=np.uint8)


def transient_tensor() -> None:
    torch.ones(17 << 20, dtype=torch.uint8)


def transient_array() -> None:
    np.ones(40 << 20, dtype=np.uint8)


def in_a_thread() -> None:
    thread = threading.Thread(target=transient_tensor)
    thread.start()
    thread.join()


def planted(monkeypatch: pytest.MonkeyPatch, *faults: Callable[[], None]) -> LoadResult:
    """Load once with all allocations recorded, and with some more allocations than the model needs."""
    original = transformers.PreTrainedModel.from_pretrained.__func__

    def loading(cls: type, *args: Any, **kwargs: Any) -> Any:
        given = original(cls, *args, **kwargs)
        for fault in faults:
            fault()
        return given

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(loading))
    recording = dataclasses.replace(job("tiny-llama"), figures=(ALLOCATIONS,), checks=False)
    result, _ = measure(recording, lambda phase: None)
    assert not result.faults
    return result


def place(fault: Callable[[], None]) -> str:
    """The second line of a function of this file, as a failure names it."""
    return f"worker/test_allocations.py:{inspect.getsourcelines(fault)[1] + 1} in {fault.__name__}"


def test_what_is_planted_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    COPIES.clear()
    result = planted(monkeypatch, kept_tensor, kept_array, transient_tensor, transient_array)
    kept = {each.site: each for each in result.allocations if each.moment == KEPT}
    assert set(kept) == {place(kept_tensor), place(kept_array)}
    assert kept[place(kept_tensor)].held_by == f"the list {__name__}.COPIES"
    assert kept[place(kept_tensor)].bytes == 3 << 20
    assert kept[place(kept_array)].held_by == "the dict attribute blocks of Cache"
    peak = [each for each in result.allocations if each.moment == "load"]
    # Neither is held while the other one is: both were the highest of their kind.
    assert [each.site for each in peak[:2]] == [place(transient_array), place(transient_tensor)]
    assert peak[1].bytes == 17 << 20
    assert {each.place for each in result.allocations} == {"host"}


def test_what_a_thread_of_the_loader_allocates_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    result = planted(monkeypatch, in_a_thread)
    assert place(transient_tensor) in [each.site for each in result.allocations if each.moment == "load"]
    assert threading.Thread.run.__qualname__ == "Thread.run"


def test_only_what_is_held_at_the_peak_counts() -> None:
    timeline = Timeline()
    timeline.allocated(1, HeldBlock(10, "a"))
    timeline.allocated(2, HeldBlock(20, "b"))
    timeline.released(2)
    timeline.allocated(2, HeldBlock(5, "c"))
    timeline.released(9)
    assert timeline.at_peak() == {1: HeldBlock(10, "a"), 2: HeldBlock(20, "b")}
    assert timeline.at_end() == {1: HeldBlock(10, "a"), 2: HeldBlock(5, "c")}
    assert by_site([HeldBlock(1, "x"), HeldBlock(4, "y"), HeldBlock(2, "x")], 2, 2) == {"y": 4, "x": 3}


def test_the_users_line_stands_beside_a_librarys() -> None:
    mine = Frame("/home/me/ourapp/serving.py", 12, "load_model")
    library = Frame("/venv/lib/python3.12/site-packages/transformers/modeling_utils.py", 40, "from_pretrained")
    inner = Frame("/venv/lib/python3.12/site-packages/torch/nn/modules/linear.py", 1, "forward")
    assert site([inner, mine]) == "ourapp/serving.py:12 in load_model"
    assert site([inner, library, mine]) == (
        "transformers/modeling_utils.py:40 in from_pretrained, called from ourapp/serving.py:12 in load_model"
    )
    assert site([Frame("<string>", 1, "<module>")]) == "a line that Python does not know"


def test_the_allocators_own_history_is_read() -> None:
    """Events as ``torch.cuda.memory._snapshot()`` has them."""
    frames = [{"filename": "/x/ourapp/serving.py", "line": 3, "name": "load"}]
    events = [
        {"action": "segment_alloc", "addr": 1, "size": 2 << 20},
        {"action": "alloc", "addr": 1, "size": 512, "frames": frames},
        {"action": "alloc", "addr": 513, "size": 1024, "frames": []},
        {"action": "free_requested", "addr": 513, "size": 1024},
        {"action": "free_completed", "addr": 513, "size": 1024},
    ]
    timeline = timeline_of(events)
    assert timeline.at_end() == {1: HeldBlock(512, "ourapp/serving.py:3 in load")}
    assert sum(block.bytes for block in timeline.at_peak().values()) == 1536


def regressed(*names: str) -> Comparison:
    items = tuple(MetricVerdict(name, REGRESSED, 1.0, 2.0, "B") for name in names)
    return Comparison("memory", REGRESSED, metrics=items)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("host.settled", ["2.00 MiB by b.py:1 in g (kept after the load, held by b.COPIES)"]),
        (
            "host.peak",
            [
                "3.00 MiB by a.py:1 in f (at the peak of the load)",
                "2.00 MiB by b.py:1 in g (kept after the load, held by b.COPIES)",
            ],
        ),
        (
            "host.other_tensors host.peak",
            [
                "2.00 MiB by b.py:1 in g (kept after the load, held by b.COPIES)",
                "3.00 MiB by a.py:1 in f (at the peak of the load)",
            ],
        ),
        ("gpu.generate_peak", ["1.00 MiB on GPU 0 by c.py:1 in h (at the peak of generating)"]),
        ("token.ops", []),
    ],
)
def test_a_failure_tells_what_explains_the_metrics(names: str, told: list[str]) -> None:
    result = LoadResult({}, "loaded", phase_peaks={"load": {"host": 9.0}, "forward": {"host": 5.0}})
    result.allocations = [
        AllocationSite("load", "host", "a.py:1 in f", 3 << 20),
        AllocationSite(KEPT, "host", "b.py:1 in g", 2 << 20, "b.COPIES"),
        AllocationSite("generate", "gpu.0", "c.py:1 in h", 1 << 20),
        AllocationSite("generate", "host", "d.py:1 in i", 1 << 20),
    ]
    comparison = regressed(*names.split())
    assert allocations.lines(result, comparison) == told
    assert allocations.is_explained(comparison) == bool(told)


def test_lines_stand_beside_those_of_the_baseline() -> None:
    recorded = [
        AllocationSite("load", "host", "a.py:1 in f", 1 << 20),
        AllocationSite("load", "host", "a.py:9 in f", 8 << 20),
        AllocationSite("load", "host", "b.py:5 in g, called from c.py:3 in h", 2 << 20),
        AllocationSite(KEPT, "host", "d.py:1 in i", 4 << 20),
    ]
    now = [
        AllocationSite("load", "host", "a.py:9 in f", 9 << 20),
        AllocationSite("load", "host", "b.py:7 in g, called from c.py:4 in h", 6 << 20),
        AllocationSite("load", "host", "a.py:3 in f", 1 << 20),
        AllocationSite("load", "host", "d.py:1 in i", 512 << 10),
    ]
    result = LoadResult({}, "loaded", phase_peaks={"load": {"host": 9.0}})
    result.allocations = beside(now, recorded)
    # The largest growth first; what a line of the same file and function held, where the line itself is new.
    assert allocations.lines(result, regressed("host.peak")) == [
        "6.00 MiB by b.py:7 in g, called from c.py:4 in h (at the peak of the load, 2.00 MiB in the baseline)",
        "9.00 MiB by a.py:9 in f (at the peak of the load, 8.00 MiB in the baseline)",
        "512.00 KiB by d.py:1 in i (at the peak of the load, not among the baseline's largest)",
        "1.00 MiB by a.py:3 in f (at the peak of the load, 1.00 MiB in the baseline)",
    ]
    assert beside(now, []) == now
