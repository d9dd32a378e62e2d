"""Loads that this machine has no room for: told by the planner, before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from pytest_llmload.core.job import Checkpoint, Device, Gpu
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.host.checks.requirements import does_not_fit
from pytest_llmload.strategies.builtin import BUILTIN

GIB = 1 << 30


def test_a_model_that_the_host_has_no_room_for_is_skipped_and_others_run(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makeconftest(
        """
        from pytest_llmload.host.loads import hardware
        hardware.host_memory = lambda: 24 << 20
        """
    )
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.dtype("bf16", "fp32")
        def test_a(llm): pass
        """
    )
    result = project("-rs", preset=True)
    result.assert_outcomes(passed=1, skipped=1)
    reason = r"SKIPPED.*: fp32 needs 31\.\d+ MiB on the host by plan, which has 24\.00 MiB"
    assert re.search(reason, result.stdout.str())
    required = project("--llm-require-hardware", preset=True)
    required.assert_outcomes(passed=1, errors=1)


@pytest.mark.parametrize(("settled", "skips"), [(9 * GIB, False), (10 * GIB, True)])
def test_a_gpus_context_takes_its_part(settled: int, skips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_llmload.host.loads.hardware.host_memory", lambda: 64 * GIB)
    spec = LoadSpec(model="org/model", name="model", gpu_count=2)
    gpus = tuple(Gpu(f"GPU-{index}", "A GPU", 10 * GIB, (9, 0), index) for index in range(2))
    broker = SimpleNamespace(
        checkpoint=lambda model: Checkpoint("/model", "s", "w", bytes=18 * GIB),
        gpus_needed=lambda spec: 2,
        plan=lambda spec: {"gpu.0.settled": 8 * GIB, "gpu.1.settled": settled, "host.weights": 0},
    )
    loads = SimpleNamespace(of=lambda spec: SimpleNamespace(measured=False))
    state = SimpleNamespace(
        broker=broker,
        loads=loads,
        strategies=BUILTIN,
        device=Device("cuda", "a-gpu", gpus),
        settings=SimpleNamespace(predict=None),
    )
    reason = does_not_fit(state, spec)  # type: ignore[arg-type]
    said = "none needs 10.00 GiB on GPU 1 by plan, which has 9.41 GiB beside CUDA's context"
    assert reason == (said if skips else None)
