"""What a load gave: plain data that crosses process borders and goes into reports and baselines."""

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

#: Parts of the loading call among a load's phases, as they are sampled: reading, converting and quantising, moving.
SAMPLED_PARTS = ("load.read", "load.convert", "load.move", "load.other")
#: What the time of a load is made of.
LOAD_PARTS = (*SAMPLED_PARTS, "adapter")


@dataclass(frozen=True)
class ManifestRow:
    """Alike modules of a model: one row for ``model.layers.*.mlp.up_proj``, not forty."""

    #: Module path; the first number in it stands as ``*``.
    module: str
    #: Which numbers the ``*`` stands for: ``0-39`` or ``0-3,7``; empty where there is no ``*``.
    indices: str
    #: Class of the module.
    cls: str
    #: Stored dtype of its own parameters: ``bfloat16``, ``uint8``; joined by ``+`` where they differ.
    dtype: str
    #: ``cuda:0``, ``cpu``, ``disk``, ``meta``.
    device: str
    #: ``nf4 absmax=uint8 nested block=64 compute=bf16``; empty where dense.
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
    #: One sentence: what is, and what should be.
    message: str
    #: Names of the modules or tensors, each perhaps with its bytes.
    names: tuple[str, ...] = ()
    #: Bytes concerned.
    bytes: int = 0
    #: What to write where this is as it should be; empty where there is nothing to allow.
    hint: str = ""


@dataclass(frozen=True)
class Fault:
    """A check or a probe that raised: a fault of pytest-llmload (or of a hook's probe), not of the load."""

    #: ``check 'values'``, ``probe 'Manifest'``.
    who: str
    #: One sentence: who raised what, and where.
    message: str
    traceback: str = ""


#: When memory of an :class:`AllocationSite` was held, beside the phases ``load`` and ``generate``: after the load.
KEPT = "kept"


@dataclass(frozen=True)
class AllocationSite:
    """A line of code and the memory that it allocated, in a load that was repeated with its allocations recorded."""

    #: ``load`` or ``generate``: held when most was held in that phase, and not part of the model; ``kept``: still held
    #: after the load, and not part of the model.
    moment: str
    #: ``host``, or ``gpu.0`` …
    place: str
    #: ``ourapp/serving.py:12 in load_model``.
    site: str
    bytes: int
    #: The variable or attribute that keeps it: ``ourapp.serving.COPIES``; empty where nothing is known.
    held_by: str = ""


@dataclass
class ErrorInfo:
    """An exception or a death, as text."""

    #: One sentence; empty where an exception has none.
    message: str
    #: Qualified class name of an exception; empty for a death.
    type_name: str = ""
    traceback: str = ""
    #: Last lines that the load's process printed.
    log: str = ""
    #: What it was doing: import, context, load, applied, forward, generate, run.
    phase: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.type_name, self.message) if part)


@dataclass
class Numbers:
    """The model's fingerprint on fixed tokens, compared by relative error while weights are equal."""

    #: positions x ids logits, fp32, row by row.
    logits: list[float] = field(default_factory=list)
    #: log-sum-exp of each position.
    logsumexp: list[float] = field(default_factory=list)
    #: Difference of the two highest logits of each position.
    margin: list[float] = field(default_factory=list)
    #: Non-persistent floating buffers (rotary frequencies …): name -> [sum, L2 norm].
    buffers: dict[str, list[float]] = field(default_factory=dict)
    #: Rows x ids logits after a padded batch and of a decoded step, fp32.
    padded: list[float] = field(default_factory=list)
    #: Output of each layer: name -> [L2 norm, product with fixed signs].
    layers: dict[str, list[float]] = field(default_factory=dict)
    #: Content of the stored weights: alike tensors -> checksum of all their bytes.
    checksums: dict[str, str] = field(default_factory=dict)


@dataclass
class LoadResult:
    """One load: how it ended, what it is, what it cost."""

    spec: dict[str, Any]
    outcome: str
    error: ErrorInfo | None = None
    problems: list[Problem] = field(default_factory=list)
    #: Checks and probes that raised; the load's other checks and figures are not concerned.
    faults: list[Fault] = field(default_factory=list)
    #: Flat: ``gpu.settled`` (sum), ``gpu.0.settled`` (each), ``load`` … in the metric's unit.
    metrics: dict[str, float] = field(default_factory=dict)
    #: The metrics that the user's probes declare; ours are in :data:`pytest_llmload.core.metrics.METRICS`.
    declared: tuple[Metric, ...] = ()
    #: Metric -> why it could not be measured.
    unavailable: dict[str, str] = field(default_factory=dict)
    #: Time metric -> samples in seconds, in the order taken.
    samples: dict[str, list[float]] = field(default_factory=dict)
    #: Highest figure per phase (load, forward, generate): ``gpu.0`` … and ``host`` -> bytes.
    phase_peaks: dict[str, dict[str, float]] = field(default_factory=dict)
    #: Memory while loading, for the report: ``gpu.0`` … and ``host`` -> pairs of seconds and bytes, in order of time.
    timeline: dict[str, list[list[float]]] = field(default_factory=dict)
    #: Of a predicted load, the places that allocate the most: phase -> operator, line, bytes, count, bytes at the peak.
    sites: dict[str, list[list[Any]]] = field(default_factory=dict)
    #: Where the driver's figure of one GPU comes from: weights, rest, reserved, context, other, process.
    ledger: list[dict[str, float]] = field(default_factory=list)
    #: Seconds of each phase: import, context, load, forward, generate; and of the load its LOAD_PARTS.
    phases: dict[str, float] = field(default_factory=dict)
    #: Looks at the loading call, from which its parts are taken; of too few there are none.
    phase_samples: int = 0
    numbers: Numbers = field(default_factory=Numbers)
    manifest: list[ManifestRow] = field(default_factory=list)
    #: What the model is besides its modules: ``config.rope_theta``, ``attention``, ``mode.training``, ``cache.dtype`` …
    settings: dict[str, str] = field(default_factory=dict)
    #: Versions, hardware and settings, from an allow-list.
    environment: dict[str, str] = field(default_factory=dict)
    #: ``shape`` and ``weights`` of the model.
    digests: dict[str, str] = field(default_factory=dict)
    #: Logical bytes of the model's weights if nothing were sharded.
    whole_bytes: int = 0
    #: Facts worth telling that are no failure: pinned fp32 parameters, ignored keys, LOAD REPORT lines.
    notes: list[str] = field(default_factory=list)
    #: Who allocated what, largest first; of a load whose gate was red, and which was then repeated to be recorded.
    allocations: list[AllocationSite] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if the load ended in the model that was asked for."""
        return self.outcome == LOADED

    @property
    def table(self) -> Mapping[str, Metric]:
        """Every metric that this load may have, by name: ours, then those of the user's probes."""
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
