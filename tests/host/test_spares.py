"""A process that is made ready before its load is asked for: real processes on the CPU, and locks of a GPU's name."""

from __future__ import annotations

import dataclasses
import os
import platform
import select
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.job import HERE, MEMORY, RANKS, WITHOUT_TIMES, Checkpoint, Device, Gpu, Job
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import LoadSpec, Workload
from pytest_llmload.host.loads import gpu_leases, hardware, processes
from pytest_llmload.host.loads.broker import Broker
from pytest_llmload.host.loads.expected_loads import ExpectedLoads
from pytest_llmload.host.loads.gpu_leases import Lease
from pytest_llmload.host.loads.preloaded_modules import BASE, architecture
from pytest_llmload.host.loads.process_end import ProcessEnd
from pytest_llmload.host.loads.process_factory import ProcessFactory
from pytest_llmload.host.loads.processes import LoadProcess
from pytest_llmload.host.loads.processes import fork as forked_by
from pytest_llmload.host.loads.spares import Spares, most
from pytest_llmload.host.loads.warm_server import WarmServer, variables
from pytest_llmload.worker.checkpoints.resolve import resolve

TIMEOUT = 240


@pytest.fixture(scope="module")
def job(checkpoint_cache: Path) -> Job:
    found = resolve("random:tiny-llama", checkpoint_cache)
    return Job(
        spec=LoadSpec(model="random:tiny-llama", name="tiny-llama", workload=Workload(1, 8, 2)),
        device=Device("cpu", f"cpu-{platform.machine()}"),
        checkpoint=Checkpoint(**dataclasses.asdict(found)),
        figures=(MEMORY,),
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmServer]:
    """Return a warm server, as a run with a quantised load has one: started, and it has imported everything itself."""
    server = WarmServer(tmp_path_factory.mktemp("server") / "server.log", variables(os.environ))
    server.warm_up([*BASE, *architecture("llama"), "bitsandbytes"], None)
    yield server
    server.close()


@pytest.fixture
def forked(tmp_path: Path, server: WarmServer) -> Iterator[Callable[[], LoadProcess]]:
    """Start a load's process; whatever is left of it ends with the test."""
    started: list[LoadProcess] = []

    def fork() -> LoadProcess:
        process = forked_by(server, tmp_path / f"{len(started)}.log")
        assert isinstance(process, LoadProcess), process
        started.append(process)
        return process

    yield fork
    for process in started:
        process.kill()


def stub_device(count: int = 1, total: int = 100) -> Device:
    """Return a device of GPUs that are not there, whose locks no other test takes."""
    gpus = (Gpu(uuid=f"GPU-{uuid.uuid4()}", name="stub", total=total, capability=(9, 0)) for _ in range(count))
    return Device("cuda", "stub", gpus=tuple(gpus))


@pytest.fixture
def unheld(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Return a device of one GPU that no process uses, as the driver would say."""
    monkeypatch.setattr(hardware, "holders", lambda gpu, own=(): [])
    return stub_device()


def broker_of(job: Job, folder: Path, device: Device | None = None) -> Broker:
    """Return a broker that can only lease, and prepare processes."""
    nothing: Any = SimpleNamespace(inline=False, recording=False, predict=None, endpoint=None, wait_gpu=0, timeout=0)
    strategies: Any = {job.spec.strategy: SimpleNamespace(runs_in=HERE, takes_endpoint=False)}
    return Broker(
        nothing,
        strategies,
        nothing,
        lambda: device or job.device,
        lambda result: None,
        lambda result: "",
        folder,
        lambda: nothing,
    )


def test_what_was_made_ready_loads_as_any_other(job: Job, forked: Callable[[], LoadProcess]) -> None:
    spares = Spares()
    spares.make(job, (), forked)
    assert spares.next_job == job
    taken = spares.take(job)
    assert taken is not None
    process, _ = taken
    assert not spares
    assert not spares.pids
    reply = process.request({"kind": "load", "job": job.to_json()}, TIMEOUT)
    result = LoadResult.from_json(reply["result"])
    assert result.ok
    phases = list(result.phases)
    assert phases.index("context") < phases.index("warm_up") < phases.index("load")

    other = forked()
    plain = LoadResult.from_json(other.request({"kind": "load", "job": job.to_json()}, TIMEOUT)["result"])
    exact = ("host.weights", "weights.logical", "host.other_tensors")
    assert {name: result.metrics[name] for name in exact} == {name: plain.metrics[name] for name in exact}
    assert result.manifest == plain.manifest


def test_a_spare_keeps_its_own_helpers_when_another_load_ends(job: Job, forked: Callable[[], LoadProcess]) -> None:
    """What samples its memory is an orphan, as is what the ended load has left behind."""
    other = forked()
    spares = Spares()
    spares.make(job, (), forked)
    taken = spares.take(job)
    assert taken is not None
    other.close()
    result = LoadResult.from_json(taken[0].request({"kind": "load", "job": job.to_json()}, TIMEOUT)["result"])
    assert "host.anon_peak" in result.metrics, result.unavailable
    assert result.timeline["host"]


def test_a_spare_for_a_different_load_is_ended(job: Job, forked: Callable[[], LoadProcess]) -> None:
    spares = Spares()
    spares.make(job, (), forked)
    (pid,) = spares.pids
    began = time.monotonic()
    assert spares.take(dataclasses.replace(job, spec=dataclasses.replace(job.spec, dtype="fp32"))) is None
    assert not Path(f"/proc/{pid}").exists()
    assert not spares
    assert time.monotonic() - began < processes._GRACE, "it was not killed, since it did not lead a session yet"


def test_spares_are_taken_in_the_order_in_which_they_were_made(job: Job, forked: Callable[[], LoadProcess]) -> None:
    spares = Spares(limit=2)
    second = dataclasses.replace(job, spec=dataclasses.replace(job.spec, dtype="fp32"))
    spares.make(job, (), forked)
    first_pid = spares.pids
    spares.make(second, (), forked)
    spares.make(job, (), lambda: pytest.fail("a third one"))
    assert len(spares) == 2
    taken = spares.take(job)
    assert taken is not None
    assert {taken[0].pid} == first_pid
    assert spares.next_job == second
    assert spares.take(job) is None
    assert not spares


@pytest.mark.parametrize(("cores", "number"), [(2, 1), (8, 2), (64, 2)])
def test_a_machine_of_few_cores_prepares_one_process(monkeypatch: pytest.MonkeyPatch, cores: int, number: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert most() == number


def test_what_follows_is_what_the_tests_expect_and_no_load_more(job: Job) -> None:
    specs = [dataclasses.replace(job.spec, dtype=dtype) for dtype in ("fp32", "fp16", "bf16")]
    expected = ExpectedLoads()
    expected.specs = specs
    expected.measured(specs[0])
    assert expected.after(specs[0], []) == specs[1]
    assert expected.after(specs[0], [specs[1]]) == specs[2]
    for spec in specs[1:]:
        expected.measured(spec)
    assert expected.after(specs[1], []) is None


def test_a_load_that_tests_ask_for_follows_as_often_as_there_are_such_tests(job: Job) -> None:
    expected = ExpectedLoads()
    expected.asking = {"first", "second", "third"}
    expected.measured(job.spec)
    assert expected.after(job.spec, [job.spec]) == job.spec
    assert expected.after(job.spec, [job.spec] * 2) is None
    expected.test_ended("first")
    expected.measured(job.spec)
    assert expected.after(job.spec, []) == job.spec
    assert expected.after(job.spec, [job.spec]) is None
    expected.test_ended("second")
    expected.measured(job.spec)
    assert expected.after(job.spec, []) is None, "it is the last test, and has asked once"
    expected.measured(job.spec)
    assert expected.after(job.spec, []) == job.spec, "it has asked again, so it may ask for more"


def test_the_repeats_of_a_recording_follow_their_load(job: Job) -> None:
    first, second = (dataclasses.replace(job.spec, dtype=dtype) for dtype in ("fp32", "fp16"))
    expected = ExpectedLoads()
    expected.specs = [first] * 3 + [second] * 3
    expected.measured(first)
    assert expected.after(first, []) == first
    assert expected.after(first, [first]) == first
    expected.measured(first)
    assert expected.after(first, [first]) == second
    expected.measured(second)
    assert expected.after(second, []) == second, "the first one failed: its repeats do not come any more"


def test_a_load_on_a_gpu_has_the_next_one_prepared(
    job: Job, forked: Callable[[], LoadProcess], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = stub_device(total=1 << 40)
    monkeypatch.setattr(hardware, "used_by", lambda gpu, pid: 1)
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    monkeypatch.setattr(ProcessFactory, "forks", lambda self, spec: True)
    broker = broker_of(job, tmp_path, device)
    broker.expected.asking = {"this test", "the next"}
    monkeypatch.setattr(broker._jobs, "gpus_needed", lambda spec: 1)
    monkeypatch.setattr(broker._jobs, "job", lambda spec, scope, held: job)
    monkeypatch.setattr(broker._factory, "fork_spare", forked)
    process = forked()
    for phase in ("start", "warm_up"):
        broker._beside(process, job, WITHOUT_TIMES, Lease(device.gpus), phase)
        assert broker._spares.specs == [job.spec] * (phase == "warm_up")
    broker._spares.discard()


def test_the_ranks_of_a_later_test_are_not_the_present_load_s_error(
    job: Job, forked: Callable[[], LoadProcess], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = stub_device(total=1 << 40)
    broker = broker_of(job, tmp_path, device)
    broker.expected.specs = [dataclasses.replace(job.spec, strategy="ranks", world_size=3)]
    strategies: Any = {job.spec.strategy: SimpleNamespace(runs_in=HERE), "ranks": SimpleNamespace(runs_in=RANKS)}
    monkeypatch.setattr(broker, "_strategies", strategies)
    monkeypatch.setattr(broker._jobs, "_strategies", strategies)
    monkeypatch.setattr(hardware, "used_by", lambda gpu, pid: 1)
    monkeypatch.setenv("PET_NNODES", "2")
    broker._beside(forked(), job, WITHOUT_TIMES, Lease(device.gpus), "warm_up")
    assert not broker._spares


def test_a_process_that_still_ends_is_waited_for_before_the_locks_are_free(
    job: Job, unheld: Device, forked: Callable[[], LoadProcess], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise a different run on the machine would take the GPU, and call the process foreign."""
    monkeypatch.setattr(hardware, "used_by", lambda gpu, pid: 1)
    broker = broker_of(job, tmp_path, unheld)
    monkeypatch.setattr(broker._jobs, "job", lambda spec, scope, held: dataclasses.replace(job, spec=spec))

    def after_the_end_of(process: LoadProcess, discard: Callable[[], None]) -> None:
        assert not process.alive, "it still ends"
        discard()

    different = dataclasses.replace(job.spec, dtype="fp32")
    ends: list[Callable[[], object]] = [partial(broker._take_spare, different, WITHOUT_TIMES), broker._end_loads]
    for end in ends:
        held = gpu_leases.lease(unheld, 1, wait_foreign=0, wait_lock=0)
        broker._spares.make(dataclasses.replace(job, device=unheld), held.descriptors, forked)
        process = forked()
        broker._end(process, held)
        with monkeypatch.context() as patch:
            patch.setattr(broker._spares, "discard", partial(after_the_end_of, process, broker._spares.discard))
            assert not end()
        assert not broker._spares


def test_an_interruption_leaves_no_spare_and_no_lock(
    job: Job, unheld: Device, forked: Callable[[], LoadProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C, or pytest-timeout: while one is made, while it is waited for, and while a load's process ends."""

    def interrupted(*_: Any) -> Any:
        pytest.fail("Timeout (>6.0s) from pytest-timeout.")

    def interrupted_once(patch: pytest.MonkeyPatch) -> None:
        patch.undo()
        interrupted()

    spares = Spares(limit=2)
    process = forked()
    held = gpu_leases.lease(unheld, 1, wait_foreign=0, wait_lock=0)
    monkeypatch.setattr(process, "send", interrupted)
    with pytest.raises(pytest.fail.Exception):
        spares.make(job, held.descriptors, lambda: process)
    assert not process.alive
    assert not spares

    first, second = forked(), forked()
    spares.make(job, held.descriptors, lambda: first)
    spares.make(job, held.descriptors, lambda: second)
    monkeypatch.setattr(first, "_receive", interrupted)
    with pytest.raises(pytest.fail.Exception):
        spares.take(job)
    assert not first.alive
    assert spares.pids == {second.pid}
    spares.discard()

    ending = forked()
    with monkeypatch.context() as patch:
        patch.setattr(ending, "_ended", partial(interrupted_once, patch))
        with pytest.raises(pytest.fail.Exception):
            ProcessEnd().end(ending, held, next_is_ready=False)
    assert not ending.alive
    gpu_leases.lease(unheld, 1, wait_foreign=0, wait_lock=0).release()


def test_a_spare_whose_server_was_killed_leaves_the_load_to_a_new_server(job: Job, tmp_path: Path) -> None:
    server = WarmServer(tmp_path / "server.log", variables(os.environ))
    spares = Spares()
    spares.make(job, (), lambda: forked_by(server, tmp_path / "spare.log"))
    server._process.kill()
    assert spares.take(job) is None
    assert not spares
    server.close()


def test_a_spare_that_fails_leaves_the_failure_to_the_load(job: Job, forked: Callable[[], LoadProcess]) -> None:
    spares = Spares()
    missing = dataclasses.replace(job, imports=("no_such_module_anywhere",))
    spares.make(missing, (), forked)
    assert spares.take(missing) is None
    process = forked()
    reply = process.request({"kind": "load", "job": missing.to_json()}, TIMEOUT)
    assert "no_such_module_anywhere" in reply["error"]["message"]


def test_a_spare_that_no_load_is_asked_of_ends_by_itself(job: Job, forked: Callable[[], LoadProcess]) -> None:
    spares = Spares(idle=0.0)
    spares.make(job, (), forked)
    descriptor = os.pidfd_open(*spares.pids)
    ended, _, _ = select.select([descriptor], [], [], TIMEOUT)
    os.close(descriptor)
    assert ended, "it still waits"
    assert spares.take(job) is None


def test_the_locks_of_the_gpus_last_as_long_as_the_spare(
    job: Job, unheld: Device, forked: Callable[[], LoadProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = gpu_leases.lease(unheld, 1, wait_foreign=0, wait_lock=0)
    spares = Spares()
    spares.make(job, held.descriptors, forked)
    held.release()
    with pytest.raises(MachineError, match="other loads hold them"):
        gpu_leases.lease(unheld, 1, wait_foreign=0, wait_lock=0)
    taken = spares.take(job)
    assert taken is not None
    process, lease = taken
    process.close()
    assert len(lease.descriptors) == 1
    lease.release()
    gpu_leases.lease(unheld, 1, wait_foreign=0, wait_lock=0).release()


@pytest.mark.parametrize(
    ("ready", "used", "waits"), [(True, 0.5, False), (True, 0.6, True), (False, 0.1, True)], ids=str
)
def test_the_end_of_a_load_is_waited_for_unless_the_next_process_is_ready(
    job: Job,
    unheld: Device,
    forked: Callable[[], LoadProcess],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ready: bool,
    used: float,
    waits: bool,
) -> None:
    monkeypatch.setattr(hardware, "used_by", lambda gpu, pid: used * gpu.total)
    broker = broker_of(job, tmp_path)
    if ready:
        broker._spares.make(job, (), forked)
    process = forked()
    held = gpu_leases.lease(unheld, 1, wait_foreign=0, wait_lock=0)
    broker._end(process, held)
    assert process.alive is not waits
    assert not held.descriptors
    broker._lease(job.spec)
    assert not process.alive
    assert not Path(f"/proc/{process.pid}").exists()
