"""Every metric, declared once: the table that drives comparison, reports, docs, JUnit and JSON.

Adding a metric is one row here and one probe that fills it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pytest_llmload.core.units import Tolerance, parse_tolerance

#: What is compared in the memory section beside the metrics: the modules, and the model's own numbers.
MANIFEST = "manifest"
NUMBERS = "numbers"

MIB = 1 << 20


@dataclass(frozen=True)
class Metric:
    """One measured figure."""

    name: str
    #: ``B`` (bytes), ``s`` (seconds), ``1`` (a count).
    unit: str
    #: exact, loading_work, allocator, driver, host, work, time
    kind: str
    #: Where it stands in a baseline: memory, work or time.
    section: str
    tolerance: Tolerance
    description: str
    #: Environment entries that must be equal, else the metric is only a reason.
    depends: tuple[str, ...] = ()
    #: Reported, never gated.
    informative: bool = False
    #: Whether more is better; of nearly every metric less is.
    more_is_better: bool = False

    @property
    def exact(self) -> bool:
        """Whether repeats of one load must agree to the byte, so that a recording refuses what differs."""
        return self.kind in ("exact", "loading_work")


_EXACT = Tolerance()
_ALLOCATOR = Tolerance(absolute=2 * MIB)
_HOST = Tolerance(relative=0.05, absolute=8 * MIB)
_DRIVER = Tolerance(absolute=64 * MIB)
_LOADING = ("torch", "transformers", "accelerate", "bitsandbytes")


def _work(prefix: str, where: str) -> tuple[Metric, ...]:
    rows = (
        ("ops", "1", _EXACT, "ATen operators"),
        ("kernels", "1", _EXACT, "GPU kernels"),
        ("copies", "1", _EXACT, "Copies and fills of GPU memory"),
        ("syncs", "1", _EXACT, "Calls that wait for the GPU"),
        ("gpu_time", "s", Tolerance(relative=0.01), "Time that GPU kernels take"),
    )
    return tuple(
        Metric(f"{prefix}.{name}", unit, "work", "work", tolerance, f"{what} {where}", ("torch.minor",))
        for name, unit, tolerance, what in rows
    )


def _served(*rows: tuple[str, str]) -> tuple[Metric, ...]:
    return tuple(
        Metric(f"served.{name}", "s", "time", "time", Tolerance(relative=0.10), what, ("host",)) for name, what in rows
    )


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("gpu.weights", "B", "exact", "memory", _EXACT, "Live weight storages on the GPUs after the load"),
        Metric("host.weights", "B", "exact", "memory", _EXACT, "Live weight storages on the host after the load"),
        Metric(
            "gpu.logical",
            "B",
            "exact",
            "memory",
            _EXACT,
            "Weights on the GPUs by elements",
            informative=True,
        ),
        Metric("weights.logical", "B", "exact", "memory", _EXACT, "Weights by elements, wherever they live"),
        Metric(
            "weights.adapter",
            "B",
            "exact",
            "memory",
            _EXACT,
            "The adapter's part of weights.logical; loads with an adapter only",
        ),
        Metric(
            "gpu.other_tensors",
            "B",
            "exact",
            "memory",
            _EXACT,
            "Live GPU tensors after the load that are no part of the model",
        ),
        Metric(
            "host.other_tensors",
            "B",
            "exact",
            "memory",
            _EXACT,
            "Live host tensors after the load that are no part of the model",
        ),
        Metric(
            "gpu.load_allocated",
            "B",
            "loading_work",
            "memory",
            _EXACT,
            "Bytes ever asked of the GPUs' allocators during the load",
            _LOADING,
        ),
        Metric(
            "gpu.load_allocations",
            "1",
            "loading_work",
            "memory",
            _EXACT,
            "Allocations on the GPUs during the load",
            _LOADING,
        ),
        Metric("gpu.settled", "B", "allocator", "memory", _ALLOCATOR, "Allocated on the GPUs after the load"),
        Metric(
            "gpu.load_peak",
            "B",
            "allocator",
            "memory",
            Tolerance(relative=0.01),
            "Highest allocation on the GPUs during the load",
        ),
        Metric(
            "gpu.forward_peak",
            "B",
            "allocator",
            "memory",
            _ALLOCATOR,
            "Highest allocation on the GPUs during the first forward",
            informative=True,
        ),
        Metric(
            "gpu.generate_peak",
            "B",
            "allocator",
            "memory",
            _ALLOCATOR,
            "Highest allocation on the GPUs while generating the workload",
        ),
        Metric(
            "gpu.reserved_peak",
            "B",
            "allocator",
            "memory",
            Tolerance(relative=0.05),
            "Highest reservation of the caching allocator over all phases",
        ),
        Metric(
            "gpu.process",
            "B",
            "driver",
            "memory",
            _DRIVER,
            "The process's GPU memory as the driver counts it, after generating",
            ("driver",),
        ),
        Metric(
            "gpu.context",
            "B",
            "driver",
            "memory",
            _DRIVER,
            "GPU memory of the CUDA context, before any tensor",
            ("driver",),
        ),
        Metric(
            "host.peak",
            "B",
            "host",
            "memory",
            _HOST,
            "Growth of the process's peak resident memory, mapped libraries apart, since the mark after imports",
            ("malloc",),
        ),
        Metric(
            "host.settled",
            "B",
            "host",
            "memory",
            _HOST,
            "Growth of anonymous resident memory after load and one forward",
            ("malloc",),
        ),
        Metric(
            "host.anon_peak",
            "B",
            "host",
            "memory",
            _HOST,
            "Peak of anonymous resident memory, sampled",
            ("malloc",),
            informative=True,
        ),
        Metric(
            "host.file",
            "B",
            "host",
            "memory",
            _HOST,
            "Growth of file-backed resident memory (mapped checkpoint pages)",
            ("malloc",),
            informative=True,
        ),
        *_work("prefill", "for the workload's prompt and one token"),
        *_work("token", "per further token"),
        Metric(
            "shard.logical",
            "B",
            "exact",
            "memory",
            _EXACT,
            "Weights of one rank by elements, of a load that is split over ranks",
            informative=True,
        ),
        Metric(
            "shard.peak",
            "B",
            "host",
            "memory",
            _HOST,
            "Growth of one rank's peak resident memory",
            ("malloc",),
            informative=True,
        ),
        Metric(
            "shard.settled",
            "B",
            "host",
            "memory",
            _HOST,
            "Growth of one rank's anonymous resident memory after load and one forward",
            ("malloc",),
            informative=True,
        ),
        Metric(
            "server.settled",
            "B",
            "host",
            "memory",
            _HOST,
            "Anonymous memory of a started server's processes once it has answered, libraries and all",
            ("malloc",),
        ),
        Metric(
            "server.peak",
            "B",
            "host",
            "memory",
            _HOST,
            "Peak resident memory of a started server's processes, files that are still mapped apart, summed",
            ("malloc",),
        ),
        Metric(
            "kv_cache.tokens",
            "1",
            "exact",
            "memory",
            _EXACT,
            "Tokens that an endpoint's key-value cache holds, as it reports it; more is better",
            more_is_better=True,
        ),
        Metric(
            "load",
            "s",
            "time",
            "time",
            Tolerance(relative=0.10),
            "The loading call alone: no download, import, context or tokenizer; of a started server, from its start "
            "to its first answer",
            ("host", "page_cache"),
        ),
        Metric(
            "ttft",
            "s",
            "time",
            "time",
            Tolerance(relative=0.10),
            "Time to first token: prefill of the workload and one token",
            ("host",),
        ),
        Metric(
            "per_token",
            "s",
            "time",
            "time",
            Tolerance(relative=0.10),
            "Time per further token of the workload, at its batch size",
            ("host",),
        ),
        *_served(
            ("ttft.x8", "Time to first token of an endpoint that is asked eight times at once"),
            ("per_token.x8", "Time per further token of each of eight answers at once"),
            ("total.x8", "Eight requests at once, from the first one sent to the end of the last answer"),
        ),
    )
}

_NUMBERED = re.compile(r"^(gpu|shard)\.\d+\.")


def find(name: str) -> Metric | None:
    """The declaration of a metric, None where there is none; ``gpu.0.settled`` is declared by ``gpu.settled``,
    ``shard.1.logical`` by ``shard.logical``.
    """
    return METRICS.get(_NUMBERED.sub(r"\1.", name))


def lookup(name: str) -> Metric:
    """The declaration of a metric, as :func:`find`. Raises KeyError with the known names."""
    metric = find(name)
    if metric is None:
        raise KeyError(f"unknown metric {name!r}; known: {', '.join((*METRICS, MANIFEST, NUMBERS))}")
    return metric


def section_of(name: str) -> str:
    """The section of a metric, of ``manifest`` or of ``numbers``. Raises KeyError for another name."""
    return "memory" if name in (MANIFEST, NUMBERS) else lookup(name).section


def tolerance_of(name: str, given: str | Tolerance) -> Tolerance:
    """The tolerance of a metric, or of ``numbers`` (the relative error), as somebody gave it.

    Raises KeyError for another name, and ValueError for what means nothing for this one.
    """
    if name == MANIFEST:
        raise ValueError(f"{name}: modules are compared exactly, there is no tolerance to give")
    unit = "1" if name == NUMBERS else lookup(name).unit
    try:
        tolerance = given if isinstance(given, Tolerance) else parse_tolerance(given, unit)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if section_of(name) == "time" and tolerance == Tolerance():
        raise ValueError(f"{name}: no two times are equal: its tolerance has to be more than 0")
    return tolerance
