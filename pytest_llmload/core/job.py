"""What the pytest side asks a load process to do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pytest_llmload.core.registry import BUILTIN_PROBES, LOADING_PROBES, TIME_PROBES, WORK_PROBES
from pytest_llmload.core.spec import LoadSpec

#: Whether a checkpoint's pages are in memory before it is loaded.
WARM, COLD, UNCONTROLLED = "warm", "cold", "uncontrolled"


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
    """Where loads of this run go."""

    #: ``cpu`` or ``cuda`` (ROCm builds too, as torch calls them).
    kind: str
    #: Directory of its baselines: ``cpu-x86_64``, ``nvidia-h100-80gb-hbm3`` (without ``-xN``).
    key: str
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, present on this machine."""

    #: Directory with config.json and safetensors.
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


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter's files, present on this machine."""

    #: Directory with adapter_config.json and adapter_model.safetensors.
    path: str
    #: Digest of the content.
    weights: str


@dataclass(frozen=True)
class Scope:
    """What a load is made for."""

    #: Whether figures are taken; a load that is opened again only to serve tests skips them.
    measure: bool = True
    #: Whether it is checked; one that repeats another for some figures was checked by that one.
    checks: bool = True
    #: Whether it generates; one of which only its own time is wanted does not.
    generates: bool = True
    #: ``module:Class`` of each probe, in the order they run; None: those of the run.
    probes: tuple[str, ...] | None = None


EVERYTHING = Scope()
SERVING = Scope(measure=False)
TIMES = Scope(checks=False, probes=TIME_PROBES)
WORK = Scope(checks=False, probes=WORK_PROBES)
LOADING = Scope(checks=False, generates=False, probes=LOADING_PROBES)


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
    #: Strategy name -> ``module:Class``.
    strategies: dict[str, str] = field(default_factory=dict)
    #: ``module:Class`` of each probe, in the order they run.
    probes: tuple[str, ...] = BUILTIN_PROBES
    sys_path: tuple[str, ...] = ()
    cwd: str = ""
    trust_remote_code: bool = False
    #: As in :class:`Scope`.
    measure: bool = True
    checks: bool = True
    generates: bool = True
    #: ``--llm-endpoint``, where the load is that of a server that runs already; then the checkpoint may have no files.
    endpoint: str = ""
    #: Seconds after which the pytest process gives up.
    timeout: float = 1800.0
    #: What becomes of the checkpoint's pages before the load: ``warm``, ``cold`` or ``uncontrolled`` (nothing).
    page_cache: str = UNCONTROLLED

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "spec": self.spec.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Job:
        device = data["device"]
        gpus = tuple(Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in device["gpus"])
        return cls(
            **{
                **data,
                "spec": LoadSpec.from_json(data["spec"]),
                "device": Device(**{**device, "gpus": gpus}),
                "checkpoint": Checkpoint(**data["checkpoint"]),
                "adapter": Adapter(**data["adapter"]) if data.get("adapter") else None,
                **{name: tuple(data[name]) for name in ("imports", "probes", "sys_path")},
            }
        )
