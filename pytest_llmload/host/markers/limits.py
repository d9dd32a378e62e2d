"""The markers that bound what a load may need, and what they need of the machine."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from pytest_llmload.host.markers.base import LimitMarker, quoted


class GpuMemoryMarker(LimitMarker):
    """Skip where a GPU has less memory in total, as in '40GiB'."""

    name = "gpu_memory"
    hardware = True

    @staticmethod
    def signature(size: str) -> None: ...

    @classmethod
    def read(cls, mark: pytest.Mark, where: str) -> int:
        """Return the bytes that each GPU must have. Raises UsageError."""
        from pytest_llmload.core.units import parse_bytes

        try:
            (size,) = [*mark.args, *mark.kwargs.values()]
            return parse_bytes(size)
        except ValueError:
            raise pytest.UsageError(f"{where}: gpu_memory: write one size, as in gpu_memory('40GiB')") from None


class MemoryCeilingMarker(LimitMarker):
    """Fail if a GPU or the host needs more, in any phase or the named one (load, forward, generate)."""

    name = "memory_ceiling"

    @staticmethod
    def signature(*, gpu: str | None = None, host: str | None = None, phase: str | None = None) -> None: ...

    @classmethod
    def read(cls, mark: pytest.Mark, where: str) -> tuple[dict[str, int], tuple[str, ...]]:
        """Return the bytes for ``gpu`` and ``host``, and the phases in which they hold. Raises UsageError."""
        from pytest_llmload.core.metrics import PEAK_PHASES
        from pytest_llmload.core.units import parse_bytes

        kwargs = dict(mark.kwargs)
        phase = kwargs.pop("phase", None)
        if mark.args or not kwargs or set(kwargs) - {"gpu", "host"}:
            raise pytest.UsageError(f"{where}: memory_ceiling: write memory_ceiling(gpu='9GiB'), host=, or both")
        if phase is not None and phase not in PEAK_PHASES:
            raise pytest.UsageError(
                f"{where}: memory_ceiling: unknown phase {quoted(phase)}; use one of {', '.join(PEAK_PHASES)}"
            )
        try:
            sizes = {side: parse_bytes(size) for side, size in kwargs.items()}
        except ValueError as error:
            raise pytest.UsageError(f"{where}: memory_ceiling: {error}") from None
        return sizes, (phase,) if phase else PEAK_PHASES


class Budget(NamedTuple):
    """A limit of one time."""

    #: As the test has it.
    text: str
    #: Seconds; None if the limit is relative.
    seconds: float | None = None
    #: The part of the baseline's median by which the time may exceed it.
    relative: float = 0.0

    @classmethod
    def parse(cls, text: object) -> Budget:
        """Return the limit ``"150ms"``, or ``"+10%"`` of the baseline's median. Raises ValueError."""
        from pytest_llmload.core.units import parse_seconds

        if isinstance(text, str) and (match := re.fullmatch(r"\s*\+\s*(\d+(?:\.\d+)?)\s*%\s*", text)):
            if not float(match[1]):
                raise ValueError(f"{quoted(text)}: two times are never equal; give a budget of more than 0 %")
            return cls(text, relative=float(match[1]) / 100)
        return cls(str(text), parse_seconds(text))


class LatencyBudgetMarker(LimitMarker):
    """Fail if the median load time, time to first token or time per token is longer."""

    name = "latency_budget"

    @staticmethod
    def signature(*, load: str | None = None, ttft: str | None = None, per_token: str | None = None) -> None: ...

    @classmethod
    def read(cls, mark: pytest.Mark, where: str) -> dict[str, Budget]:
        """Return the limits of ``load``, ``ttft`` and ``per_token``. Raises UsageError."""
        from pytest_llmload.core.metrics import MODEL_TIMES

        if mark.args or not mark.kwargs or set(mark.kwargs) - set(MODEL_TIMES):
            raise pytest.UsageError(f"{where}: latency_budget: write latency_budget(load='30s'), ttft=, per_token=")
        try:
            return {name: Budget.parse(text) for name, text in mark.kwargs.items()}
        except ValueError as error:
            raise pytest.UsageError(f"{where}: latency_budget: {error}") from None
