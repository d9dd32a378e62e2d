"""When a process is prepared for the next load, and for which: rules that need no process and no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_llmload.core.job import EVERYTHING, SERVING, WITHOUT_TIMES, Checkpoint, Device, Gpu, Job, Scope
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.host.loads import hardware
from pytest_llmload.host.loads.expected_loads import ExpectedLoads
from pytest_llmload.host.loads.spare_policy import SparePolicy

SPEC = LoadSpec(model="random:tiny-llama", name="tiny-llama")
GPUS = tuple(Gpu(uuid=f"GPU-{number}", name="stub", total=100, capability=(9, 0)) for number in range(2))
ONE, TWO = (Device("cuda", "stub", gpus=GPUS[:count]) for count in (1, 2))
PID = 7


@pytest.fixture(autouse=True)
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The bytes of each GPU that the measured load's process uses, as the driver says."""
    found = {gpu.uuid: 1 for gpu in GPUS}
    monkeypatch.setattr(hardware, "used_by", lambda gpu, pid: found[gpu.uuid] if pid == PID else 0)
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    return found


def following(
    spec: LoadSpec = SPEC,
    *,
    current: LoadSpec = SPEC,
    device: Device = ONE,
    held: tuple[Gpu, ...] = GPUS[:1],
    phase: str = "warm_up",
    scope: Scope = WITHOUT_TIMES,
    size: int = 25,
    prepared: tuple[LoadSpec, ...] = (),
    predicts: bool = False,
    forks: bool = True,
    elsewhere: bool = False,
) -> LoadSpec | None:
    """Return the load that a process is prepared for where ``spec`` is expected once, after ``current``."""

    def gpus_needed(spec: LoadSpec) -> int:
        assert not elsewhere, "the number of ranks may be wrong, which is an error of that load's own tests"
        return spec.world_size

    expected = ExpectedLoads()
    expected.specs = [current, spec]
    expected.measured(current)
    policy = SparePolicy(
        expected,
        lambda: device,
        predicts=predicts,
        runs_elsewhere=lambda spec: elsewhere,
        gpus_needed=gpus_needed,
        forks=lambda spec: forks,
    )
    job = Job(current, device, Checkpoint("/model", "shape", "weights", bytes=size))
    return policy.next_load(phase, PID, job, scope, held, prepared)


@pytest.mark.parametrize("phase", ["warm_up", "page_cache"])
def test_the_load_that_follows_is_prepared_once_the_present_one_has_its_context(phase: str) -> None:
    other = replace(SPEC, dtype="bf16")
    assert following(other, phase=phase) == other


@pytest.mark.parametrize("phase", ["start", "load", "generate"])
def test_no_process_is_prepared_in_other_phases(phase: str) -> None:
    assert following(phase=phase) is None


@pytest.mark.parametrize("scope", [EVERYTHING, SERVING])
def test_no_process_is_prepared_beside_a_load_that_is_timed_or_not_measured(scope: Scope) -> None:
    assert following(scope=scope) is None


def test_no_process_is_prepared_without_a_gpu_or_for_a_prediction() -> None:
    assert following(held=()) is None
    assert following(predicts=True) is None


@pytest.mark.parametrize(("size", "prepared"), [(25, True), (26, False)])
def test_weights_of_more_than_a_quarter_leave_no_room(size: int, prepared: bool) -> None:
    assert (following(size=size) is not None) == prepared


def test_a_driver_that_hides_a_process_would_show_a_foreign_one(used: dict[str, int]) -> None:
    two = replace(SPEC, world_size=2)
    assert following(two, current=two, device=TWO, held=GPUS) == two
    used["GPU-1"] = 0
    assert following(two, current=two, device=TWO, held=GPUS) is None


@pytest.mark.parametrize(("workers", "device", "prepared"), [("1", ONE, True), ("2", ONE, False), ("2", TWO, True)])
def test_under_xdist_only_where_each_worker_has_a_gpu(
    workers: str, device: Device, prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", workers)
    assert (following(device=device) is not None) == prepared


def test_what_has_a_process_already_gets_no_second_one() -> None:
    assert following(prepared=(SPEC,)) is None


@pytest.mark.parametrize(
    ("fields", "prepared"),
    [({"model": "random:tiny-opt"}, False), ({"adapter": "other"}, False), ({"world_size": 2}, False), ({}, True)],
)
def test_a_load_of_other_files_or_gpus_waits_for_its_own(fields: dict[str, object], prepared: bool) -> None:
    current = replace(SPEC, adapter="adapter")
    assert (following(replace(SPEC, **fields), current=current) is not None) == prepared  # type: ignore[arg-type]


def test_what_cannot_be_forked_or_runs_elsewhere_is_not_prepared() -> None:
    assert following(forks=False) is None
    assert following(elsewhere=True) is None
