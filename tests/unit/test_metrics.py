"""The names that options and checks take, and what each of them may be given."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_llmload.core.metrics import (
    METRICS,
    MODEL_TIMES,
    PEAK_PHASES,
    Metric,
    find,
    section_of,
    table_with,
    tolerance_of,
)
from pytest_llmload.core.units import Tolerance


@pytest.mark.parametrize(
    ("name", "given", "tolerance"),
    [
        ("gpu.settled", "1%|8MiB", Tolerance(0.01, 8 << 20)),
        ("gpu.0.settled", "8MiB", Tolerance(absolute=8 << 20)),
        ("gpu.load_allocations", "3", Tolerance(absolute=3)),
        ("gpu.weights", "0", Tolerance()),
        ("load", "500ms", Tolerance(absolute=0.5)),
        ("numbers", "0.1", Tolerance(absolute=0.1)),
        ("numbers", "10%", Tolerance(relative=0.1)),
        ("load", Tolerance(relative=0.2), Tolerance(relative=0.2)),
    ],
)
def test_a_tolerance_is_read_in_the_unit_of_its_metric(name: str, given: Tolerance | str, tolerance: Tolerance) -> None:
    assert tolerance_of(name, given) == tolerance


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        ("load", "8MiB", ValueError, "load: '8MiB' is not a tolerance here: write '1%', '5ms'"),
        ("gpu.settled", "5ms", ValueError, "gpu.settled: '5ms' is not a tolerance here: write '1%', '8MiB'"),
        ("gpu.settled", "1%|50%", ValueError, "gpu.settled: '1%|50%' is not a tolerance here"),
        ("load", "0%", ValueError, "load: two times are never equal; give a tolerance of more than 0"),
        ("ttft", Tolerance(), ValueError, "ttft: two times are never equal"),
        ("manifest", "1%", ValueError, "manifest: modules are compared exactly"),
        ("gpu.setled", "1%", KeyError, "unknown metric 'gpu.setled'; known: gpu.weights"),
    ],
)
def test_what_means_nothing_is_one_sentence(
    name: str, given: Tolerance | str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        tolerance_of(name, given)
    assert caught.value.args[0].startswith(message)


def test_every_name_has_a_section() -> None:
    assert [section_of(name) for name in ("gpu.1.settled", "manifest", "numbers", "token.ops", "load")] == [
        *["memory"] * 3,
        "work",
        "time",
    ]


def test_phases_and_times_are_those_of_the_table() -> None:
    phases = [METRICS[f"gpu.{phase}_peak"].section for phase in PEAK_PHASES]
    assert phases == ["memory"] * len(PEAK_PHASES)
    times = [name for name, metric in METRICS.items() if metric.section == "time" and not name.startswith("served.")]
    assert tuple(times) == MODEL_TIMES


def test_a_users_metric_is_looked_up_beside_ours_and_by_gpu() -> None:
    watts = Metric("gpu.watts", "W", "driver", "5%|3W", "Power draw")
    table = table_with([watts, watts])
    assert find("gpu.1.watts", table) is watts
    assert section_of("gpu.watts", table) == "memory"
    assert watts.tolerance == Tolerance(relative=0.05, absolute=3)
    assert tolerance_of("gpu.watts", "0.5W", table) == Tolerance(absolute=0.5)
    assert list(table)[: len(METRICS)] == list(METRICS)
    assert find("gpu.watts") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Power", "J", "driver"), "'Power' is not a metric name; write lower-case words joined by dots"),
        (("power.joules", "%", "driver"), "metric 'power.joules': '%' is not a unit"),
        (("power.joules", "J", "drivers"), "metric 'power.joules': unknown class 'drivers'; use one of exact, "),
        (
            ("power.joules", "J", "driver", "5W"),
            "metric 'power.joules': '5W' is not a tolerance here: write '1%', '3J'",
        ),
        (("boot", "s", "time"), "metric 'boot': class 'time' needs the unit 's' and a tolerance above 0"),
        (("boot", "J", "time", "5%"), "metric 'boot': class 'time' needs the unit 's'"),
        (("manifest", "B", "exact"), "'manifest' is not a metric name"),
    ],
)
def test_a_metric_that_cannot_be_says_why(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Metric(*arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ([Metric("gpu.settled", "B", "exact")], "metric 'gpu.settled' is built in; give your metric a different name"),
        (
            [Metric("power.joules", "J", "driver"), Metric("power.joules", "J", "host")],
            "metric 'power.joules' is declared twice, with different contents; give your metric a different name",
        ),
    ],
)
def test_a_name_belongs_to_one_metric(own: list[Metric], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        table_with(own)
    assert str(caught.value) == message


def test_each_metric_of_ours_is_declared_by_the_code_that_takes_it() -> None:
    from pytest_llmload.probes.builtin import GROUPS

    probes = {metric.name for group in GROUPS.values() for probe in group for metric in probe.metrics}
    #: The load's own time, one rank's figures out of all ranks', and what an endpoint's client takes.
    others = {name for name in METRICS if name == "load" or name.startswith(("shard.", "served.", "server.", "kv_"))}
    assert probes | others == set(METRICS)
    assert probes & others == {"shard.logical"}
