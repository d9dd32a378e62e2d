"""The job of each load: what its process gets to know, from the settings, the spec and the model's files."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llmload.core.errors import LoadFailed
from pytest_llmload.core.job import RANKS, UNCONTROLLED, Checkpoint, Device, Job, Scope
from pytest_llmload.system.nodes import local_size

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.loads.gpu_leases import Lease
    from pytest_llmload.host.loads.model_files import Files
    from pytest_llmload.host.loads.strategies import Strategies
    from pytest_llmload.host.settings.probes import OwnProbes
    from pytest_llmload.host.settings.settings import Settings

#: The device, and the folder of the baselines, of a server that runs already: it is on a different machine.
ENDPOINT = "endpoint"


class Jobs:
    """The jobs of a run's loads."""

    def __init__(
        self,
        settings: Settings,
        strategies: Strategies,
        probes: OwnProbes,
        files: Files,
        device: Callable[[], Device],
        cwd: Path,
    ) -> None:
        self._settings = settings
        self._strategies = strategies
        self._probes = probes
        self._files = files
        self._device = device
        self._cwd = cwd

    def runs_already(self, spec: LoadSpec) -> bool:
        """Return whether a load is that of ``--llm-endpoint``, which needs neither GPUs nor files of this machine."""
        return self._settings.endpoint is not None and bool(self._strategies[spec.strategy].takes_endpoint)

    def gpus_needed(self, spec: LoadSpec) -> int:
        """Return how many GPUs of this machine a load needs. Raises MachineError if its ranks do not divide."""
        if self.runs_already(spec):
            return 0
        in_ranks = self._strategies[spec.strategy].runs_in == RANKS
        return max(spec.gpu_count, local_size(spec.world_size) if in_ranks else spec.world_size)

    def device(self, spec: LoadSpec) -> Device:
        """Return the device that a load runs on; an endpoint's is the CPU, as this machine has the client only."""
        return Device(kind="cpu", key=ENDPOINT) if self.runs_already(spec) else self._device()

    def checkpoint(self, spec: LoadSpec) -> Checkpoint:
        """Return the files of a load's model. Raises MachineError, and LoadFailed if they are not a model."""
        if not self.runs_already(spec):
            found = self._files.checkpoint(spec.model)
            if found.unreadable and not self._strategies[spec.strategy].own_code:
                raise LoadFailed(found.unreadable)
            return found
        # What the endpoint has loaded cannot be seen; a folder that is here may have its tokenizer.
        return Checkpoint(path=spec.model if Path(spec.model).is_absolute() else "", shape="", weights="")

    def job(self, spec: LoadSpec, scope: Scope, held: Lease | None = None) -> Job:
        """Return the job of a load, on the GPUs that are ``held`` for it, or else on the first of the device.

        Raises the errors of :meth:`checkpoint`.
        """
        device = self.device(spec)
        if device.kind == "cuda":
            gpus = held.gpus if held is not None else device.gpus[: self.gpus_needed(spec)]
            device = dataclasses.replace(device, gpus=gpus)
        predicted = self._settings.predict is not None
        return Job(
            spec=spec,
            device=device,
            checkpoint=self.checkpoint(spec),
            adapter=self._files.adapter(spec),
            imports=self._settings.imports,
            strategies=self._strategies.registered,
            methods=self._strategies.methods,
            figures=scope.figures,
            probes=self._probes.of(scope),
            sys_path=tuple(sys.path),
            cwd=str(self._cwd),
            trust_remote_code=self._settings.trust_remote_code,
            measure=scope.measure,
            checks=scope.checks,
            generates=scope.generates,
            endpoint=(self._settings.endpoint or "") if self.runs_already(spec) else "",
            timeout=self._settings.timeout,
            page_cache=self._settings.page_cache if scope.measure and not predicted else UNCONTROLLED,
            predicted=predicted,
        )
