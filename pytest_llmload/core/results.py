"""The result of a load: plain data that crosses process borders and goes into reports and baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_llmload.core.metrics import METRICS, Metric, find, table_with
from pytest_llmload.core.units import Tolerance

#: How a load can end.
LOADED = "loaded"
NOT_APPLIED = "not_applied"
OUT_OF_MEMORY = "out_of_memory"
CRASHED = "crashed"
TIMEOUT = "timeout"
FAILED = "failed"

#: Parts of the loading call, found by sampling: reading, converting and quantising, moving, anything else.
SAMPLED_PARTS = ("load.read", "load.convert", "load.move", "load.other")
#: The parts that the time of a load consists of.
LOAD_PARTS = (*SAMPLED_PARTS, "adapter")


@dataclass(frozen=True)
class ManifestRow:
    """Similar modules of a model: one row for ``model.layers.*.mlp.up_proj`` instead of forty."""

    #: Module path; its first number is written as ``*``.
    module: str
    #: The numbers that the ``*`` stands for: ``0-39`` or ``0-3,7``; empty if there is no ``*``.
    indices: str
    #: Class of the module.
    cls: str
    #: Stored dtype of the module's own parameters: ``bfloat16``, ``uint8``; several dtypes are joined by ``+``.
    dtype: str
    #: ``cuda:0``, ``cpu``, ``disk``, ``meta``.
    device: str
    #: ``nf4 absmax=uint8 nested block=64 compute=bf16``; empty for a dense module.
    quant: str
    #: Modules in the row.
    count: int
    #: Bytes of parameters, buffers and quantisation states that the modules own themselves.
    bytes: int


@dataclass(frozen=True)
class Problem:
    """One reason why a strategy was not applied."""

    #: Short name of the check: ``quantised``, ``values``, ``keys`` …
    check: str
    #: One sentence: what was found, and what was expected.
    message: str
    #: Names of the modules or tensors, each perhaps with its bytes.
    names: tuple[str, ...] = ()
    #: Bytes concerned.
    bytes: int = 0
    #: What to write if this is intended; empty if it cannot be allowed.
    hint: str = ""
    #: The rank that the message is about and names; None for a problem of a load in one part, or of all its ranks.
    rank: int | None = None


@dataclass(frozen=True)
class Fault:
    """An exception of a check or a probe: a fault of pytest-llmload (or of a user's probe), not of the load."""

    #: ``check 'values'``, ``probe 'Manifest'``.
    who: str
    #: One sentence: what raised which exception, and where.
    message: str
    traceback: str = ""


#: A moment of an :class:`AllocationSite` besides the phases ``load`` and ``generate``: after the load.
KEPT = "kept"


@dataclass(frozen=True)
class AllocationSite:
    """A line of code and the memory that it allocated, in a load that was repeated with its allocations recorded."""

    #: ``load`` or ``generate``: held at the peak of that phase, and not part of the model; ``kept``: still held after
    #: the load, and not part of the model.
    moment: str
    #: ``host``, or ``gpu.0`` …
    place: str
    #: ``ourapp/serving.py:12 in load_model``.
    site: str
    bytes: int
    #: The variable or attribute that keeps it: ``ourapp.serving.COPIES``; empty if none was found.
    held_by: str = ""
    #: Bytes that the baseline's load held at this site; None if the baseline has no recorded sites.
    baseline: int | None = None


@dataclass
class ErrorInfo:
    """An exception, or the death of a process, as text."""

    #: One sentence; empty for an exception without a message.
    message: str
    #: Qualified class name of an exception; empty for a death.
    type_name: str = ""
    traceback: str = ""
    #: The last lines that the load's process printed.
    log: str = ""
    #: What the process was doing: import, context, load, applied, forward, generate, run.
    phase: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.type_name, self.message) if part)


@dataclass
class Numbers:
    """The model's outputs on fixed tokens, compared by relative error as long as the weights are equal."""

    #: positions x ids logits, fp32, row by row.
    logits: list[float] = field(default_factory=list)
    #: log-sum-exp of each position.
    logsumexp: list[float] = field(default_factory=list)
    #: Difference of the two highest logits of each position.
    margin: list[float] = field(default_factory=list)
    #: Non-persistent floating buffers (rotary frequencies …): name -> [sum, L2 norm].
    buffers: dict[str, list[float]] = field(default_factory=dict)
    #: Rows x ids logits after a padded batch and after one decoded step, fp32.
    padded: list[float] = field(default_factory=list)
    #: Output of each layer: name -> [L2 norm, product with fixed signs].
    layers: dict[str, list[float]] = field(default_factory=dict)
    #: Content of the stored weights: similar tensors -> checksum of all their bytes.
    checksums: dict[str, str] = field(default_factory=dict)


#: The beginning of the note of a load whose weights are views of larger storages.
SLACK = "weights keep "


@dataclass
class LoadResult:
    """One load: how it ended, which model it gave, and what it cost."""

    spec: dict[str, Any]
    outcome: str
    error: ErrorInfo | None = None
    problems: list[Problem] = field(default_factory=list)
    #: Checks and probes that raised; the load's other checks and figures are not affected.
    faults: list[Fault] = field(default_factory=list)
    #: Flat: ``gpu.settled`` (sum), ``gpu.0.settled`` (each), ``load`` … in the metric's unit.
    metrics: dict[str, float] = field(default_factory=dict)
    #: The metrics that the user's probes declare; built-in ones are in :data:`pytest_llmload.core.metrics.METRICS`.
    declared: tuple[Metric, ...] = ()
    #: Metric -> the reason why it could not be measured.
    unavailable: dict[str, str] = field(default_factory=dict)
    #: Time metric -> samples in seconds, in the order taken.
    samples: dict[str, list[float]] = field(default_factory=dict)
    #: Highest figure per phase (load, forward, generate): ``gpu.0`` … and ``host`` -> bytes.
    phase_peaks: dict[str, dict[str, float]] = field(default_factory=dict)
    #: Memory during the load, for the report: ``gpu.0`` … and ``host`` -> pairs of seconds and bytes, by time.
    timeline: dict[str, list[list[float]]] = field(default_factory=dict)
    #: For a predicted load, the places that allocate most: phase -> operator, line, bytes, count, bytes at the peak.
    sites: dict[str, list[list[Any]]] = field(default_factory=dict)
    #: The parts of the driver's figure for each GPU: weights, rest, reserved, context, other, process; in bytes.
    ledger: list[dict[str, float]] = field(default_factory=list)
    #: Seconds of each phase: import, context, load, forward, generate; and of each of the load's LOAD_PARTS.
    phases: dict[str, float] = field(default_factory=dict)
    #: Samples of the loading call, which divide its time into parts; too few samples give no parts.
    phase_samples: int = 0
    numbers: Numbers = field(default_factory=Numbers)
    manifest: list[ManifestRow] = field(default_factory=list)
    #: The model's settings besides its modules: ``config.rope_theta``, ``attention``, ``mode.training``, …
    settings: dict[str, str] = field(default_factory=dict)
    #: Versions, hardware and settings, from an allow-list.
    environment: dict[str, str] = field(default_factory=dict)
    #: ``shape`` and ``weights`` of the model.
    digests: dict[str, str] = field(default_factory=dict)
    #: Logical bytes of the model's weights if nothing were sharded.
    whole_bytes: int = 0
    #: Facts that are worth reporting but are not failures: pinned fp32 parameters, ignored keys, LOAD REPORT lines.
    notes: list[str] = field(default_factory=list)
    #: The lines of code that allocated memory, largest first; only of a load whose comparison failed, and which was
    #: then repeated with its allocations recorded.
    allocations: list[AllocationSite] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Return whether the load ended in the requested model."""
        return self.outcome == LOADED

    @property
    def table(self) -> Mapping[str, Metric]:
        """Return every metric that this load may have, by name: the built-in ones, then those of the user's probes."""
        return table_with(self.declared) if self.declared else METRICS

    def in_section(self, section: str) -> set[str]:
        """Return the names among ``metrics`` and ``unavailable`` that belong to ``memory``, ``work`` or ``time``."""
        names = self.metrics.keys() | self.unavailable.keys()
        declared = ((name, find(name, self.table)) for name in names)
        return {name for name, metric in declared if metric is not None and metric.section == section}

    def to_json(self) -> dict[str, Any]:
        """Return plain data that JSON can hold; :meth:`from_json` reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LoadResult:
        """Return the result that :meth:`to_json` wrote. Raises TypeError or KeyError for anything else."""
        values = dict(data)
        values["declared"] = tuple(
            Metric(**{**row, "tolerance": Tolerance(*row["tolerance"])}) for row in data.get("declared", ())
        )
        values["error"] = ErrorInfo(**data["error"]) if data.get("error") else None
        values["problems"] = [Problem(**{**row, "names": tuple(row["names"])}) for row in data.get("problems", ())]
        values["faults"] = [Fault(**row) for row in data.get("faults", ())]
        values["numbers"] = Numbers(**data.get("numbers", {}))
        values["manifest"] = [ManifestRow(**row) for row in data.get("manifest", ())]
        values["allocations"] = [AllocationSite(**row) for row in data.get("allocations", ())]
        return cls(**values)
