"""What a baseline keeps of a load's environment, and which differences are named."""

from __future__ import annotations

import pytest
from sample_loads import ENVIRONMENT, baseline_of, load

from pytest_llmload.baselines.compare import compare
from pytest_llmload.baselines.environment import changes, concerning, differing, stored
from pytest_llmload.core.environment_entries import ENTRIES, PACKAGES
from pytest_llmload.core.metrics import METRICS


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("deepspeed", "0.18.0", "0.19.1"),
        ("tensor_parallel", "2.0", "2.1"),
        ("attn", "sdpa", "eager"),
        ("rocm", "6.3", "6.4"),
        ("loader_threads", "4", "1"),
        ("libc", "glibc 2.36", "glibc 2.41"),
        ("cpu_isa", "AVX2", "AVX512"),
    ],
)
def test_an_entry_that_a_baseline_keeps_is_named_where_it_differs(name: str, old: str, new: str) -> None:
    baseline = baseline_of(None, [load(environment={**ENVIRONMENT, name: old})], update=True)
    assert baseline.environment[name] == old
    assert compare(baseline, load(environment={**ENVIRONMENT, name: new})).changed == (f"{name} {old} -> {new}",)


def test_a_setting_that_is_usually_not_made_is_named_when_it_is() -> None:
    tuned = {**ENVIRONMENT, "allocator": "expandable_segments:True"}
    assert changes(ENVIRONMENT, tuned) == ("allocator default -> expandable_segments:True",)
    assert changes(tuned, ENVIRONMENT) == ("allocator expandable_segments:True -> default",)
    assert changes(ENVIRONMENT, {**ENVIRONMENT, "peft": "0.21.0"}) == ("peft not installed -> 0.21.0",)


def test_what_an_older_baseline_does_not_tell_has_not_changed() -> None:
    newer = {**ENVIRONMENT, "attn": "sdpa", "libc": "glibc 2.36", "deepspeed": "0.18.0"}
    assert changes(ENVIRONMENT, newer) == ()
    # What is gone is told.
    assert changes(newer, ENVIRONMENT) == (
        "deepspeed 0.18.0 -> unknown",
        "attn sdpa -> unknown",
        "libc glibc 2.36 -> unknown",
    )


def test_new_entries_are_no_reason_to_write_and_come_with_the_next_one() -> None:
    old = baseline_of(None, [load()], update=True)
    newer = {**ENVIRONMENT, "attn": "sdpa"}
    assert baseline_of(old, [load(environment=newer)], update=True) is old
    heavier = load(metrics={"gpu.weights": 1}, environment=newer)
    assert baseline_of(old, [heavier], update=True).environment == {**old.environment, "attn": "sdpa"}


def test_what_belongs_to_each_time_or_to_the_spec_is_not_kept_and_neither_is_anything_unknown() -> None:
    kept = stored({**dict.fromkeys(ENTRIES, "x"), "user": "somebody", "HF_HOME": "/home/somebody", "ours": "1.0"})
    assert set(ENTRIES) - set(kept) == {"host", "page_cache", "ranks"}
    assert set(kept) - set(ENTRIES) == {"ours"}


def test_every_metric_depends_on_entries_only() -> None:
    depends = {name.removesuffix(".minor") for metric in METRICS.values() for name in metric.depends}
    assert depends <= {*ENTRIES, PACKAGES}


def test_a_different_release_of_a_quantiser_is_named() -> None:
    """Its memory and loading work may differ, so that exact figures are compared within one release only."""
    ours = {**ENVIRONMENT, "torchao": "0.18.0", "optimum.quanto": "0.2.7"}
    theirs = {**ours, "torchao": "0.18.1", "optimum.quanto": "0.2.8"}
    assert changes(ours, theirs) == ("optimum.quanto 0.2.7 -> 0.2.8", "torchao 0.18.0 -> 0.18.1")
    assert differing(ours, theirs, METRICS["gpu.load_allocations"].depends) != ""
    # The entry exists only where a load needs the package, and a baseline of an older release may lack it.
    assert differing(ENVIRONMENT, ENVIRONMENT, METRICS["gpu.load_allocations"].depends) == ""
    assert differing(ENVIRONMENT, theirs, METRICS["gpu.load_allocations"].depends) == ""
    assert stored(theirs)["optimum.quanto"] == "0.2.8"


def test_what_depends_on_a_different_release_of_a_package_is_not_kept_beside_what_was_measured_with_it() -> None:
    old = {**ENVIRONMENT, "ours": "1.0"}
    names = ("torch.minor", PACKAGES)
    assert concerning("ours", names) == ("ours",)
    assert concerning("torch", names) == ("torch.minor",)
    assert concerning("peft", names) == ()
    assert concerning("ours", ("torch",)) == ()
    assert differing(old, {**old, "ours": "1.1"}, names) == "ours 1.0 -> 1.1"
