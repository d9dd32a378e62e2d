"""``llm``: what a test sees of a load."""

from __future__ import annotations

import copy
import difflib
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pytest_llmload.core.results import ManifestRow, Numbers

if TYPE_CHECKING:
    from pytest_llmload.core.results import LoadResult
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.loads.load import Load


@dataclass(frozen=True)
class Generated:
    """What a model generated, greedily: exactly ``max_new_tokens`` tokens per prompt."""

    tokens: list[int]
    text: str


class Metrics(Mapping[str, float]):
    """Every figure of a load by name, read-only; a KeyError says why there is none."""

    def __init__(self, result: LoadResult) -> None:
        self._result = result

    def __getitem__(self, name: str) -> float:
        try:
            return self._result.metrics[name]
        except KeyError:
            raise KeyError(_absent(self._result, name)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._result.metrics)

    def __len__(self) -> int:
        return len(self._result.metrics)

    def __repr__(self) -> str:
        return repr(self._result.metrics)


def _absent(result: LoadResult, name: str) -> str:
    """Why a load has no figure of a name."""
    if name in result.unavailable:
        return f"{name} was not measured: {result.unavailable[name]}"
    alike = difflib.get_close_matches(name, result.metrics, n=1)
    meant = f"; did you mean {alike[0]}?" if alike else ""
    return f"{name} was not measured: this load has no such figure{meant}"


class Figures:
    """The metrics under one prefix as attributes: ``llm.memory.gpu.settled`` is ``gpu.settled``, in bytes."""

    def __init__(self, result: LoadResult, prefix: str) -> None:
        self._result = result
        self._prefix = prefix

    def __getattr__(self, name: str) -> float:
        if name.startswith("_"):
            raise AttributeError(name)
        full = f"{self._prefix}.{name}"
        try:
            return self._result.metrics[full]
        except KeyError:
            raise AttributeError(_absent(self._result, full)) from None

    def __repr__(self) -> str:
        own = {key: value for key, value in self._result.metrics.items() if key.startswith(f"{self._prefix}.")}
        return f"<{self._prefix}: {own}>"


class PartFigures(Figures):
    """The metrics of one GPU of the load, or of one shard."""

    @property
    def weights_share(self) -> float:
        """Its part of the whole model's weights, by elements; 0.5 on each of two GPUs that halve it."""
        return self._result.metrics[f"{self._prefix}.logical"] / self._result.whole_bytes


class Memory:
    """``.gpu``, ``.host``, ``.weights``, ``.server``: figures in bytes; ``.gpus`` and ``.shards``: each GPU's, each
    rank's; ``.kv_cache.tokens`` is what an endpoint's cache holds.
    """

    def __init__(self, result: LoadResult) -> None:
        self.gpu = Figures(result, "gpu")
        self.host = Figures(result, "host")
        self.weights = Figures(result, "weights")
        self.server = Figures(result, "server")
        self.kv_cache = Figures(result, "kv_cache")
        self.gpus = _numbered(result, "gpu")
        self.shards = _numbered(result, "shard")


def _numbered(result: LoadResult, kind: str) -> list[PartFigures]:
    parts = (name.split(".")[1] for name in result.metrics if name.startswith(f"{kind}."))
    return [
        PartFigures(result, f"{kind}.{index}") for index in sorted({int(part) for part in parts if part.isdecimal()})
    ]


class Timing:
    """The times of a load, each as a median in seconds.

    ``ttft`` and ``per_token`` are measured with the load if one of its tests uses ``latency_baseline`` or
    ``latency_budget``; otherwise in a process apart, when they are first asked for.
    """

    def __init__(self, load: Load) -> None:
        self._load = load

    @property
    def phases(self) -> Mapping[str, float]:
        """Seconds of each phase of the load's process, in the order they ran."""
        return MappingProxyType(self._load.result.phases)

    @property
    def samples(self) -> Mapping[str, tuple[float, ...]]:
        """The samples in seconds that the medians are taken from, in the order measured: name -> samples."""
        taken = self._load.with_times().samples
        return MappingProxyType({name: tuple(samples) for name, samples in taken.items()})

    def _median(self, result: LoadResult, name: str) -> float:
        samples = result.samples.get(name)
        if not samples:
            raise AttributeError(_absent(result, name))
        return statistics.median(samples)

    @property
    def load(self) -> float:
        """Seconds of the loading call alone."""
        return self._median(self._load.result, "load")

    @property
    def ttft(self) -> float:
        """Seconds to the first token: the prefill of the workload and one token."""
        return self._median(self._load.with_times(), "ttft")

    @property
    def per_token(self) -> float:
        """Seconds per further token of the workload, at its batch size."""
        return self._median(self._load.with_times(), "per_token")


class LLM:
    """A load: what was measured, frozen before any test code ran, and the model itself behind ``generate`` and ``run``.

    Raises the load's error (:class:`LoadError`) from ``generate`` and ``run`` if it did not end in a model.
    """

    def __init__(self, load: Load) -> None:
        self._load = load

    @property
    def spec(self) -> LoadSpec:
        return self._load.spec

    @property
    def outcome(self) -> str:
        """``loaded``, ``not_applied``, ``out_of_memory``, ``crashed``, ``timeout`` or ``failed``."""
        return self._load.result.outcome

    @property
    def result(self) -> LoadResult:
        """Everything that was seen, as plain data: a copy, which is the test's own."""
        return copy.deepcopy(self._load.result)

    @property
    def metrics(self) -> Mapping[str, float]:
        """Every figure by name: ``llm.metrics["gpu.settled"]``."""
        return Metrics(self._load.result)

    @property
    def memory(self) -> Memory:
        return Memory(self._load.result)

    @property
    def timing(self) -> Timing:
        return Timing(self._load)

    @property
    def work(self) -> Mapping[str, float]:
        """Kernels, copies, synchronisations and operators per token and of the prefill: counted when first asked for,
        in a process apart. Raises the load's error."""
        __tracebackhide__ = True
        if (error := self._load.error) is not None:
            raise error
        self._load.worked()
        result = self._load.result
        names = result.in_section("work")
        return MappingProxyType({name: value for name, value in result.metrics.items() if name in names})

    @property
    def numbers(self) -> Numbers:
        """The model's fingerprint: a copy, which is the test's own."""
        return copy.deepcopy(self._load.result.numbers)

    @property
    def manifest(self) -> list[ManifestRow]:
        return list(self._load.result.manifest)

    @property
    def environment(self) -> Mapping[str, str]:
        return MappingProxyType(self._load.result.environment)

    def generate(self, text: str, max_new_tokens: int = 32) -> Generated:
        """Continue a text greedily by exactly ``max_new_tokens`` tokens; EOS does not end it."""
        __tracebackhide__ = True
        return Generated(**self._load.generate(text, max_new_tokens))

    def run(self, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Any:
        """Execute ``function(model, tokenizer, *args, **kwargs)`` where the model lives, and return its plain value.

        A function travels by value; ``"module:function"`` is imported there. Raises TypeError if what it returns is
        not plain data, and what the function raises: as its own class if pytest knows it, else as RemoteError. A load
        that the function changed is not handed to the next test but loaded anew.
        """
        __tracebackhide__ = True
        return self._load.run(function, args, kwargs)

    @property
    def model(self) -> Any:
        """The model itself, under ``--llm-isolation=inline`` only; RuntimeError otherwise."""
        return self._load.model

    def __repr__(self) -> str:
        return f"<LLM {self.spec.id} {self._load.status}>"
