"""The fixture value ``llm``: a load as a test sees it."""

from __future__ import annotations

import copy
import difflib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload

from pytest_llmload.core.results import ManifestRow, Numbers

if TYPE_CHECKING:
    from pytest_llmload.core.results import LoadResult
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.loads.load import Load


#: One message of a chat: its role and its content.
Message = dict[str, Any]


@dataclass(frozen=True)
class Generated:
    """The continuation of one text: exactly ``max_new_tokens`` tokens, decoded greedily."""

    #: Ids of the new tokens, without the prompt's; none if an endpoint does not report them and its text does not tell.
    tokens: list[int]
    #: The new tokens as text.
    text: str
    #: The number of new tokens; None if an endpoint does not report it.
    count: int | None


class Metrics(Mapping[str, float]):
    """Every measured value of a load by name, read-only. A KeyError says why a value is missing."""

    def __init__(self, result: LoadResult) -> None:
        self._result = result

    def __getitem__(self, name: str) -> float:
        __tracebackhide__ = True
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
    """Return why a load lacks the value of a metric."""
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
        __tracebackhide__ = True
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
        """Return its share of the whole model's weights by elements: 0.5 on each of two GPUs that halve the model."""
        return self._result.metrics[f"{self._prefix}.logical"] / self._result.whole_bytes


class Memory:
    """The memory of a load, in bytes.

    ``.gpu`` (sum over GPUs), ``.host``, ``.weights`` and ``.server`` have a metric each as attribute: ``.gpu.settled``.
    ``.gpus`` and ``.shards`` are lists with the figures of each GPU and each rank. ``.kv_cache.tokens`` is the number
    of tokens that an endpoint's cache holds. An AttributeError says why a figure is missing.
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
    ``latency_budget``; otherwise in a separate process, when they are first requested.
    """

    def __init__(self, load: Load) -> None:
        self._load = load

    @property
    def phases(self) -> Mapping[str, float]:
        """Return the seconds of each phase of the load's process, in the order they ran."""
        return MappingProxyType(self._load.result.phases)

    @property
    def samples(self) -> Mapping[str, tuple[float, ...]]:
        """Return the samples in seconds that the medians are taken from, in the order measured: name -> samples."""
        taken = self._load.with_times().samples
        return MappingProxyType({name: tuple(samples) for name, samples in taken.items()})

    def _median(self, result: LoadResult, name: str) -> float:
        samples = result.samples.get(name)
        if not samples:
            raise AttributeError(_absent(result, name))
        return statistics.median(samples)

    @property
    def load(self) -> float:
        """Return the seconds of the loading call alone."""
        return self._median(self._load.result, "load")

    @property
    def ttft(self) -> float:
        """Return the seconds to the first token: the prefill of the workload and one token."""
        return self._median(self._load.with_times(), "ttft")

    @property
    def per_token(self) -> float:
        """Return the seconds per further token of the workload, at its batch size."""
        return self._median(self._load.with_times(), "per_token")


def _is_prompt(text: object) -> bool:
    """Return whether a value is one prompt: a text, token ids, or a chat whose messages are plain data."""
    if isinstance(text, str) or not isinstance(text, (list, tuple)):
        return isinstance(text, str) and text != ""
    if all(isinstance(each, dict) and {"role", "content"} <= each.keys() for each in text):
        return bool(text) and _is_plain(text)
    return all(type(token) is int for token in text)


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


class LLM:
    """A load: its measurements, frozen before any test code runs, and the model behind ``generate`` and ``run``.

    ``generate`` and ``run`` raise the load's error (a :class:`LoadError`) if the load did not end in a model.
    """

    def __init__(self, load: Load) -> None:
        self._load = load

    @property
    def spec(self) -> LoadSpec:
        """Return the load's frozen spec: ``spec.id`` is its name in test ids, ``spec.slug`` that of its baseline."""
        return self._load.spec

    @property
    def outcome(self) -> str:
        """Return how it ended: ``loaded``, ``not_applied``, ``out_of_memory``, ``crashed``, ``timeout``, ``failed``."""
        return self._load.result.outcome

    @property
    def result(self) -> LoadResult:
        """Return everything that was measured and found, as plain data: a copy, which a test may change."""
        return copy.deepcopy(self._load.result)

    @property
    def metrics(self) -> Mapping[str, float]:
        """Return every value by name, in its metric's unit (bytes, seconds or a count): ``metrics["gpu.settled"]``."""
        return Metrics(self._load.result)

    @property
    def memory(self) -> Memory:
        """Return the memory in bytes: ``memory.gpu.settled``, ``memory.host.peak``, ``memory.gpus[0].weights``."""
        return Memory(self._load.result)

    @property
    def timing(self) -> Timing:
        """Return the times in seconds: ``timing.load``, ``timing.ttft``, ``timing.per_token``."""
        return Timing(self._load)

    @property
    def work(self) -> Mapping[str, float]:
        """Return the counts of operators, kernels, copies and waits: ``prefill.ops``, and per token ``token.ops``.

        They are counted when first requested, in a separate process. Raises the load's error.
        """
        __tracebackhide__ = True
        if (error := self._load.error) is not None:
            raise error
        self._load.worked()
        result = self._load.result
        names = result.in_section("work")
        return MappingProxyType({name: value for name, value in result.metrics.items() if name in names})

    @property
    def numbers(self) -> Numbers:
        """Return logits, log-sum-exp and top-1 margins at fixed positions of fixed tokens, and buffer sums: a copy."""
        return copy.deepcopy(self._load.result.numbers)

    @property
    def manifest(self) -> list[ManifestRow]:
        """Return the model's modules: class, dtype, device, quantisation, count and bytes, a row for equal modules."""
        return list(self._load.result.manifest)

    @property
    def environment(self) -> Mapping[str, str]:
        """Return the versions of libraries, hardware and settings of the load's process: name -> text."""
        return MappingProxyType(self._load.result.environment)

    @overload
    def generate(self, text: str | Sequence[int] | list[Message], max_new_tokens: int = 32) -> Generated: ...

    @overload
    def generate(
        self, text: list[str] | list[list[int]] | list[list[Message]], max_new_tokens: int = 32
    ) -> list[Generated]: ...

    def generate(self, text: Any, max_new_tokens: int = 32) -> Generated | list[Generated]:
        """Continue a prompt greedily by exactly ``max_new_tokens`` tokens; an end-of-sequence token does not end it.

        A prompt is a text, the ids of its tokens, or the messages of a chat, ``[{"role": "user", "content": "Hi"}]``,
        for the tokenizer's chat template. Returns ``.tokens`` (a list of ``max_new_tokens`` ids), ``.text`` and
        ``.count``; for a list of prompts a list of those, each as if it had been the only one. Raises the load's error,
        RemoteError if generating raises, TypeError for anything except prompts, and ValueError if the checkpoint lacks
        the tokenizer or the template that a prompt needs.
        """
        __tracebackhide__ = True
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be a whole number of at least 1; got {max_new_tokens!r:.80}")
        if _is_prompt(text):
            return Generated(**self._load.generate(text, max_new_tokens))
        if isinstance(text, (list, tuple)) and text and all(map(_is_prompt, text)):
            return [Generated(**self._load.generate(each, max_new_tokens)) for each in text]
        raise TypeError(
            "llm.generate takes a text, the ids of its tokens, the messages of a chat (each a dict with 'role' and "
            f"'content'), or a list of such prompts; got {text!s:.80}"
        )

    def run(self, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Any:
        """Execute ``function(model, tokenizer, *args, **kwargs)`` where the model lives, and return its plain value.

        A function is sent by value; ``"module:function"`` is imported in the load's process. Raises TypeError if the
        value is not plain data (a tensor: call ``.tolist()``), and the function's own exception: as its own class if
        pytest's process knows that class, else as RemoteError with its traceback. If the function changes the model,
        the next test gets a new load.
        """
        __tracebackhide__ = True
        return self._load.run(function, args, kwargs)

    @property
    def model(self) -> Any:
        """Return the model itself, with ``--llm-isolation=inline`` only. Raises RuntimeError otherwise."""
        __tracebackhide__ = True
        return self._load.model

    def __repr__(self) -> str:
        return f"<LLM {self.spec.id} {self._load.status}>"
