"""Weights quantised while they are loaded: one strategy for each scheme, made from its method's declarations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.job import Device, Job
from pytest_llmload.core.references import resolve
from pytest_llmload.core.results import Problem
from pytest_llmload.core.spec import BY_CONFIG
from pytest_llmload.quantisation import Method, Scheme
from pytest_llmload.strategies.base import Refused, Strategy

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec


class Quantised(Strategy):
    """Passes the ``quantization_config`` of its method to ``from_pretrained``."""

    scheme: ClassVar[Scheme]
    method: ClassVar[Method]

    @classmethod
    def why_not_by_default(cls, device: Device) -> str:
        return "" if cls.scheme.by_default else "only if --llm-strategy names it"

    def load_kwargs(self, job: Job) -> dict[str, Any]:
        try:
            return {"quantization_config": self.method.config(job, self.scheme.name, _skips(job))}
        except NotImplementedError as error:
            raise Refused(Problem("quantised", f"{self.name} cannot be loaded: {error}")) from error


class Configured(Strategy):
    """Passes the ``quantization_config`` that the user's function returns."""

    name = BY_CONFIG
    summary = "Any quantization_config of the user's own: quant(config='pkg.mod:function')."
    fields: ClassVar[dict[str, Any]] = {"quant": BY_CONFIG}

    @classmethod
    def why_not_by_default(cls, device: Device) -> str:
        return "only if a test names a function: quant(config='pkg.mod:function')"

    @classmethod
    def refuses(cls, spec: LoadSpec, endpoint: str) -> str:
        if spec.quant_config is None:
            return f"quant({BY_CONFIG!r}) needs config='pkg.mod:function', which returns a quantization_config"
        return ""

    def load_kwargs(self, job: Job) -> dict[str, Any]:
        assert job.spec.quant_config is not None
        return {"quantization_config": resolve(job.spec.quant_config)(job.spec)}


def strategies_of(schemes: Iterable[tuple[Scheme, Method]]) -> dict[str, type[Strategy]]:
    """Return a strategy for each scheme, by the scheme's name."""
    return {scheme.name: _strategy(scheme, method) for scheme, method in schemes}


def _strategy(scheme: Scheme, method: Method) -> type[Strategy]:
    members: dict[str, Any] = {
        "__module__": type(method).__module__,
        "__doc__": scheme.summary,
        "name": scheme.name,
        "summary": scheme.summary,
        "fields": {"quant": scheme.name},
        "also": scheme.also,
        "options": method.settings,
        "packages": (*Strategy.packages, *method.packages, *scheme.packages),
        "scheme": scheme,
        "method": method,
    }
    return type(f"Quantised_{scheme.name}", (Quantised,), members)


def _skips(job: Job) -> tuple[str, ...]:
    """Return the modules that the config of a load names as dense; the model is made only if the test names some."""
    from pytest_llmload.quantisation.registry import with_default_skips
    from pytest_llmload.worker.checkpoints.architecture import meta_model

    if not job.spec.skip_modules:
        return ()
    directory = Path(job.checkpoint.path)
    model = meta_model(directory, trust_remote_code=job.trust_remote_code, auto_class=job.spec.auto_class)
    return with_default_skips(model, job.spec.skip_modules)
