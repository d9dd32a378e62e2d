"""Every metric, declared once: the table that drives comparison, reports, docs, JUnit and JSON.

Each built-in metric is one row of :data:`METRICS`, and the probe that measures it names it in ``Probe.metrics``. A
user's probe declares its own :class:`Metric` there. The functions take the table to search: :func:`table_with` adds the
user's metrics to the built-in ones.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pytest_llmload.core.environment_entries import QUANTISERS
from pytest_llmload.core.units import Tolerance, parse_tolerance

#: Names of what the memory section compares besides metrics: the modules, and the model's own numbers.
MANIFEST = "manifest"
NUMBERS = "numbers"

#: The phases of a load that have a memory peak of their own, in order.
PEAK_PHASES = ("load", "forward", "generate")
#: The times of one load and one request; the other metrics of time are those of several requests at once.
MODEL_TIMES = ("load", "ttft", "per_token")

MIB = 1 << 20
_EXACT = Tolerance()

#: Class of a metric -> what the class says about its figures.
KINDS = {
    "exact": "equal in every load",
    "loading_work": "equal in every load under the same library versions",
    "allocator": "as torch's caching allocator counts",
    "driver": "as the GPU's driver counts",
    "host": "as the operating system counts",
    "work": "counted per token and for the prefill",
    "time": "seconds, judged over several processes",
}
_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*", re.ASCII)
_UNIT = re.compile(r"1|[^\W\d_][\w/]*")


@dataclass(frozen=True, init=False)
class Metric:
    """A declaration of one measured figure: its name, its unit, and what a change of it means.

    Args:
        name: Words in lower case joined by dots. ``gpu.settled`` stands for each GPU's ``gpu.0.settled`` too.
        unit: ``B`` (bytes), ``s`` (seconds), ``1`` (a count), or any other unit, such as ``J``.
        kind: The class, one of :data:`KINDS`. It decides in which section of a baseline the figure stands.
        tolerance: How far the figure may move before a test fails, in ``unit`` or relative; or text: ``"1%|8MiB"``.
        description: One sentence for the documentation.
        depends: Environment entries that must be equal, else the figures are not compared.
        informative: True for a figure that is reported and never gated.
        more_is_better: True if a larger figure is an improvement; by default a smaller one is.
        late: True for a figure that a baseline need not have: it is then compared without it.

    Raises ValueError if one of them is invalid.
    """

    name: str
    unit: str
    kind: str
    tolerance: Tolerance
    description: str
    depends: tuple[str, ...]
    informative: bool
    more_is_better: bool
    late: bool

    def __init__(
        self,
        name: str,
        unit: str,
        kind: str,
        tolerance: Tolerance | str = _EXACT,
        description: str = "",
        depends: Iterable[str] = (),
        informative: bool = False,
        more_is_better: bool = False,
        late: bool = False,
    ) -> None:
        if not _NAME.fullmatch(name) or name in (MANIFEST, NUMBERS):
            raise ValueError(f"{name!r} is not a metric name; write lower-case words joined by dots: 'power.joules'")
        if not _UNIT.fullmatch(unit):
            raise ValueError(
                f"metric {name!r}: {unit!r} is not a unit; write 'B', 's', '1' or another word such as 'J'"
            )
        if kind not in KINDS:
            raise ValueError(f"metric {name!r}: unknown class {kind!r}; use one of {', '.join(KINDS)}")
        try:
            allowed = parse_tolerance(tolerance, unit) if isinstance(tolerance, str) else tolerance
        except ValueError as error:
            raise ValueError(f"metric {name!r}: {error}") from None
        if kind == "time" and (unit != "s" or allowed == _EXACT):
            raise ValueError(f"metric {name!r}: class 'time' needs the unit 's' and a tolerance above 0: times vary")
        values = (name, unit, kind, allowed, description, tuple(depends), informative, more_is_better, late)
        for item, value in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, item.name, value)

    @property
    def section(self) -> str:
        """Return the section of a baseline that holds the metric: ``memory``, ``work`` or ``time``."""
        return self.kind if self.kind in ("work", "time") else "memory"

    @property
    def exact(self) -> bool:
        """Return whether repeats of one load must agree to the byte; a recording refuses repeats that differ."""
        return self.kind in ("exact", "loading_work")


_ALLOCATOR = Tolerance(absolute=2 * MIB)
_HOST = Tolerance(relative=0.05, absolute=8 * MIB)
_DRIVER = Tolerance(absolute=64 * MIB)
_LOADING = ("torch", "transformers", "accelerate", *QUANTISERS)


def _work(prefix: str, where: str) -> tuple[Metric, ...]:
    rows = (
        ("ops", "1", _EXACT, "ATen operators"),
        ("kernels", "1", _EXACT, "GPU kernels"),
        ("copies", "1", _EXACT, "Copies and fills of GPU memory"),
        ("syncs", "1", _EXACT, "Calls that wait for the GPU"),
        ("gpu_time", "s", Tolerance(relative=0.01), "Time that GPU kernels take"),
    )
    return tuple(
        Metric(f"{prefix}.{name}", unit, "work", tolerance, f"{what} {where}", ("torch.minor",))
        for name, unit, tolerance, what in rows
    )


def _served(*rows: tuple[str, str]) -> tuple[Metric, ...]:
    return tuple(
        Metric(f"served.{name}", "s", "time", Tolerance(relative=0.10), what, ("host",)) for name, what in rows
    )


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("gpu.weights", "B", "exact", _EXACT, "Live weight storages on the GPUs after the load"),
        Metric("host.weights", "B", "exact", _EXACT, "Live weight storages on the host after the load"),
        Metric(
            "gpu.logical",
            "B",
            "exact",
            _EXACT,
            "Weights on the GPUs by elements",
            informative=True,
        ),
        Metric("weights.logical", "B", "exact", _EXACT, "Weights by elements, wherever they live"),
        Metric(
            "weights.adapter",
            "B",
            "exact",
            _EXACT,
            "The adapter's part of weights.logical; loads with an adapter only",
        ),
        Metric(
            "gpu.other_tensors",
            "B",
            "exact",
            _EXACT,
            "Live GPU tensors after the load that do not belong to the model",
        ),
        Metric(
            "host.other_tensors",
            "B",
            "exact",
            _EXACT,
            "Live host tensors after the load that do not belong to the model",
        ),
        Metric(
            "gpu.load_allocated",
            "B",
            "loading_work",
            _EXACT,
            "Bytes requested from the GPUs' allocators during the load, in total",
            _LOADING,
        ),
        Metric(
            "gpu.load_allocations",
            "1",
            "loading_work",
            _EXACT,
            "Allocations on the GPUs during the load",
            _LOADING,
        ),
        Metric("gpu.settled", "B", "allocator", _ALLOCATOR, "Allocated on the GPUs after the load"),
        Metric(
            "gpu.load_peak",
            "B",
            "allocator",
            # Threads read ahead of what merges a checkpoint's experts: which tensors are there at the peak is theirs.
            Tolerance(relative=0.01, absolute=2 * MIB),
            "Highest allocation on the GPUs during the load",
        ),
        Metric(
            "gpu.forward_peak",
            "B",
            "allocator",
            _ALLOCATOR,
            "Highest allocation on the GPUs during the first forward",
            informative=True,
        ),
        Metric(
            "gpu.generate_peak",
            "B",
            "allocator",
            _ALLOCATOR,
            "Highest allocation on the GPUs while generating the workload",
        ),
        Metric(
            "gpu.reserved_peak",
            "B",
            "allocator",
            Tolerance(relative=0.05),
            "Highest reservation of the caching allocator over all phases",
        ),
        Metric(
            "gpu.process",
            "B",
            "driver",
            _DRIVER,
            "The process's GPU memory as the driver counts it, after generating",
            ("driver",),
        ),
        Metric(
            "gpu.context",
            "B",
            "driver",
            _DRIVER,
            "GPU memory of the CUDA context, before any tensor",
            ("driver",),
        ),
        Metric(
            "host.peak",
            "B",
            "host",
            _HOST,
            "Growth of the process's peak resident memory since the imports, without mapped libraries",
            ("malloc",),
        ),
        Metric(
            "host.settled",
            "B",
            "host",
            _HOST,
            "Growth of anonymous resident memory after load and one forward",
            ("malloc",),
        ),
        Metric(
            "host.anon_peak",
            "B",
            "host",
            _HOST,
            "Peak of anonymous resident memory, sampled",
            ("malloc",),
            informative=True,
        ),
        Metric(
            "host.file",
            "B",
            "host",
            _HOST,
            "Growth of file-backed resident memory (mapped checkpoint pages)",
            ("malloc",),
            informative=True,
        ),
        Metric(
            "gpu.growth",
            "B",
            "exact",
            _EXACT,
            "GPU memory that every further call of the model keeps",
            late=True,
        ),
        Metric(
            "host.growth",
            "B",
            "host",
            Tolerance(absolute=64 << 10),
            "Host memory that every further call of the model keeps; up to 8 KiB count as none",
            ("malloc",),
            late=True,
        ),
        *_work("prefill", "for the workload's prompt and one token"),
        *_work("token", "per further token"),
        Metric(
            "shard.logical",
            "B",
            "exact",
            _EXACT,
            "Weights of one rank by elements, for a load that is split over ranks",
            informative=True,
        ),
        Metric(
            "shard.peak",
            "B",
            "host",
            _HOST,
            "Growth of one rank's peak resident memory",
            ("malloc",),
            informative=True,
        ),
        Metric(
            "shard.settled",
            "B",
            "host",
            _HOST,
            "Growth of one rank's anonymous resident memory after load and one forward",
            ("malloc",),
            informative=True,
        ),
        Metric(
            "server.settled",
            "B",
            "host",
            _HOST,
            "Anonymous memory of a started server's processes once it has answered, including its libraries",
            ("malloc",),
        ),
        Metric(
            "server.peak",
            "B",
            "host",
            _HOST,
            "Sum of the peak resident memory of a started server's processes, without files that are still mapped",
            ("malloc",),
        ),
        Metric(
            "kv_cache.tokens",
            "1",
            "exact",
            _EXACT,
            "Tokens that an endpoint's key-value cache holds, as it reports it; more is better",
            more_is_better=True,
        ),
        Metric(
            "load",
            "s",
            "time",
            Tolerance(relative=0.10),
            "The loading call alone, without download, import, context or tokenizer; for a started server, the time "
            "from its start to its first answer",
            ("host", "page_cache"),
        ),
        Metric(
            "ttft",
            "s",
            "time",
            Tolerance(relative=0.10),
            "Time to first token: prefill of the workload and one token",
            ("host",),
        ),
        Metric(
            "per_token",
            "s",
            "time",
            Tolerance(relative=0.10),
            "Time per further token of the workload, at its batch size",
            ("host",),
        ),
        *_served(
            ("ttft.x8", "Time to first token of an endpoint that gets eight requests at once"),
            ("per_token.x8", "Time per further token of each of eight simultaneous answers"),
            ("total.x8", "Eight requests at once, from the first one sent to the end of the last answer"),
        ),
    )
}

_NUMBERED = re.compile(r"^(gpu|shard)\.\d+\.")


def named(*names: str) -> tuple[Metric, ...]:
    """Return the built-in metrics of these names, for the declaration of the code that measures them.

    Raises KeyError for an unknown name.
    """
    return tuple(METRICS[name] for name in names)


def of_gpu(name: str, gpu: int) -> str:
    """Return the name of one GPU's figure: ``gpu.0.settled`` for ``gpu.settled``."""
    return name.replace("gpu.", f"gpu.{gpu}.", 1)


def table_with(own: Iterable[Metric]) -> Mapping[str, Metric]:
    """Return the built-in metrics followed by the user's. Raises ValueError for a name that is already taken."""
    table = dict(METRICS)
    for metric in own:
        if table.setdefault(metric.name, metric) != metric:
            owner = "is built in" if metric.name in METRICS else "is declared twice, with different contents"
            raise ValueError(f"metric {metric.name!r} {owner}; give your metric a different name")
    return table


def find(name: str, table: Mapping[str, Metric] = METRICS) -> Metric | None:
    """Return the declaration of a metric, or None. ``gpu.settled`` declares ``gpu.0.settled`` too."""
    return table.get(name) or table.get(_NUMBERED.sub(r"\1.", name))


def lookup(name: str, table: Mapping[str, Metric] = METRICS) -> Metric:
    """Return the declaration of a metric, as :func:`find`. Raises KeyError with the known names."""
    metric = find(name, table)
    if metric is None:
        raise KeyError(f"unknown metric {name!r}; known: {', '.join((*table, MANIFEST, NUMBERS))}")
    return metric


def section_of(name: str, table: Mapping[str, Metric] = METRICS) -> str:
    """Return the section of a metric, of ``manifest`` or of ``numbers``. Raises KeyError for any other name."""
    return "memory" if name in (MANIFEST, NUMBERS) else lookup(name, table).section


def tolerance_of(name: str, given: str | Tolerance, table: Mapping[str, Metric] = METRICS) -> Tolerance:
    """Return the tolerance that the user gave a metric, or ``numbers`` (their relative error).

    Raises KeyError for an unknown metric, and ValueError for a tolerance that does not apply to this metric.
    """
    if name == MANIFEST:
        raise ValueError(f"{name}: modules are compared exactly, so a tolerance does not apply; remove it")
    unit = "1" if name == NUMBERS else lookup(name, table).unit
    try:
        tolerance = given if isinstance(given, Tolerance) else parse_tolerance(given, unit)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if section_of(name, table) == "time" and tolerance == _EXACT:
        raise ValueError(f"{name}: two times are never equal; give a tolerance of more than 0")
    return tolerance
