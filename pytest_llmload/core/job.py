"""The job of a load's process: what the pytest side asks it to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_llmload.core.spec import LoadSpec

#: The state of the page cache before a load: the checkpoint's pages are in memory, are not, or may be.
WARM, COLD, UNCONTROLLED = "warm", "cold", "uncontrolled"

#: The process that has the model: the load's own, ranks that it starts, or a model server that it calls.
HERE, RANKS, SERVER = "here", "ranks", "server"

#: Groups of figures that a load can take; ``probes/builtin.py`` lists the probes of each. ``MEMORY``: memory, manifest
#: and logits; ``TIMING``: a few rounds for the report; ``LOAD_TIME`` and ``GENERATION_TIME``: rounds that alternate
#: with a control, to judge whether a time has changed; ``WORK``: counts under the profiler.
MEMORY, TIMING = "memory", "timing"
LOAD_TIME, GENERATION_TIME, WORK = "load_time", "generation_time", "work"
#: Not a figure: the lines of code that allocate.
ALLOCATIONS = "allocations"


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver's library describes it."""

    uuid: str
    name: str
    #: Bytes.
    total: int
    #: Compute capability: ``(9, 0)``.
    capability: tuple[int, int]
    #: Place in the parent's list of visible GPUs.
    index: int = 0
    #: ``1g.10gb`` …; empty for a whole GPU.
    mig_profile: str = ""


@dataclass(frozen=True)
class Device:
    """The device on which a run loads its models."""

    #: ``cpu`` or ``cuda`` (ROCm builds too, as torch calls them).
    kind: str
    #: Directory of its baselines: ``cpu-x86_64``, ``nvidia-h100-80gb-hbm3`` (without ``-xN``).
    key: str
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, present on this machine."""

    #: Directory with config.json and weights.
    path: str
    #: Digest of config geometry, tensor names, shapes and stored dtypes.
    shape: str
    #: Digest of the content.
    weights: str
    #: Resolved commit of a hub model; context only.
    revision: str = ""
    #: Bytes of the weight files.
    bytes: int = 0
    model_type: str = ""
    #: Why only a user's own loader may load it; empty if transformers would.
    unreadable: str = ""
    #: Of a cut model: module path of a stack of layers -> the numbers of the whole model's layers that it keeps.
    kept_layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter's files, present on this machine."""

    #: Directory with adapter_config.json and adapter_model.safetensors.
    path: str
    #: Digest of the content.
    weights: str


@dataclass(frozen=True)
class Scope:
    """The purpose of a load: what it measures, checks and generates."""

    #: True if the load takes figures; a load that is opened again only to serve tests skips them.
    measure: bool = True
    #: True if the load is checked. A load that repeats an earlier one for some figures was checked with that one.
    checks: bool = True
    #: True if the load generates; a load that is only timed itself does not.
    generates: bool = True
    #: The groups of figures that the load takes.
    figures: tuple[str, ...] = (MEMORY, TIMING)
    #: The sections of a baseline for which the user's probes run: those with a metric in one of them; None for all.
    own_probes: tuple[str, ...] | None = None


EVERYTHING = Scope()
#: For a load whose times no test reads: the timed rounds take longer than the rest of a small load.
WITHOUT_TIMES = Scope(figures=(MEMORY,))
#: A few timed rounds, for a test that reads times without having announced it.
TIMES_ALONE = Scope(checks=False, figures=(TIMING,), own_probes=())
SERVING = Scope(measure=False)
TIMES = Scope(checks=False, figures=(LOAD_TIME, GENERATION_TIME), own_probes=("time",))
RECORDING = Scope(checks=False, figures=(ALLOCATIONS,), own_probes=())
COUNTING = Scope(checks=False, figures=(WORK,), own_probes=("work",))
LOADING = Scope(checks=False, generates=False, figures=(LOAD_TIME,), own_probes=())


@dataclass(frozen=True)
class Job:
    """One load: everything that the process needs to know."""

    spec: LoadSpec
    device: Device
    checkpoint: Checkpoint
    #: The files of ``spec.adapter``; None where the load has none.
    adapter: Adapter | None = None
    #: Modules imported before loading (``--llm-import``).
    imports: tuple[str, ...] = ()
    #: Strategies that hooks registered: name -> ``module:Class``.
    strategies: dict[str, str] = field(default_factory=dict)
    #: The groups of figures to take, as in :class:`Scope`.
    figures: tuple[str, ...] = (MEMORY, TIMING)
    #: ``module:Class`` of each quantisation method that a hook registered.
    methods: tuple[str, ...] = ()
    #: ``module:Class`` of each probe that a hook registered; they run after the built-in ones.
    probes: tuple[str, ...] = ()
    sys_path: tuple[str, ...] = ()
    cwd: str = ""
    trust_remote_code: bool = False
    #: As in :class:`Scope`.
    measure: bool = True
    checks: bool = True
    generates: bool = True
    #: ``--llm-endpoint``, if the model is that of a server that runs already; the checkpoint may then have no files.
    endpoint: str = ""
    #: Seconds after which the pytest process gives up.
    timeout: float = 1800.0
    #: The state of the page cache to set before the load: ``warm``, ``cold`` or ``uncontrolled`` (as it is).
    page_cache: str = UNCONTROLLED
    #: True if this machine does not have the device, and the load's memory is predicted for it.
    predicted: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain data that JSON can hold; :meth:`from_json` reads it."""
        return {**dataclasses.asdict(self), "spec": self.spec.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Job:
        """Return the job that :meth:`to_json` wrote. Raises TypeError or KeyError for anything else."""
        device = data["device"]
        gpus = tuple(Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in device["gpus"])
        return cls(
            **{
                **data,
                "spec": LoadSpec.from_json(data["spec"]),
                "device": Device(**{**device, "gpus": gpus}),
                "checkpoint": Checkpoint(**data["checkpoint"]),
                "adapter": Adapter(**data["adapter"]) if data.get("adapter") else None,
                **{name: tuple(data[name]) for name in ("imports", "figures", "methods", "probes", "sys_path")},
            }
        )
