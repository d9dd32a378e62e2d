"""All that can be known of a model before its weights are here: every way of loading it, on GPUs of any size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_llmload.core.errors import LoadFailed
from pytest_llmload.core.job import Checkpoint, Device, Gpu, Job
from pytest_llmload.core.presets import PREFIX, config_of
from pytest_llmload.core.spec import LoadSpec, Workload
from pytest_llmload.core.units import format_ranges
from pytest_llmload.worker.checkpoints.build import write_json
from pytest_llmload.worker.checkpoints.cut import cut_config_of, cut_outline
from pytest_llmload.worker.checkpoints.hub import download_outline
from pytest_llmload.worker.checkpoints.weights import read_tensors
from pytest_llmload.worker.planning.cache import Cache, cache_of
from pytest_llmload.worker.planning.placement import CONTEXT, Placement
from pytest_llmload.worker.planning.planner import LoadPlan, load_dtype, plan_load

_MOST_TOKENS = 1 << 24
_MOST_BATCH = 1 << 16


@dataclass(frozen=True)
class Asked:
    """A way of loading that is to be planned."""

    #: What it sets in a LoadSpec.
    fields: Mapping[str, Any]
    placement: Placement
    gpu_count: int = 1


@dataclass(frozen=True)
class Way:
    """One way of loading a model, before it happens."""

    slug: str
    #: Why it cannot be planned; then there is nothing else.
    problem: str = ""
    #: Predicted figures in bytes, as a load's metrics are named.
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    fits: bool = False
    #: Bytes of the workload's cache, and what generating it holds on the GPU beside the weights.
    cache: int = 0
    working: int = 0
    #: Longest sequence of one, and largest batch of the workload's length; 0 where not even that fits.
    tokens: int = 0
    batch: int = 0
    #: Device -> its blocks, as ranges.
    places: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Overview:
    """What ``llmload plan`` tells."""

    model_type: str
    parameters: int
    #: Kind of layer -> how many, of the generation cache; bytes of one token in it, and of one sequence at all.
    cache_kinds: dict[str, int]
    cache_per_token: int
    cache_constant: int
    context: int
    ways: tuple[Way, ...]


def outline(model: str, folder: Path, *, trust_remote_code: bool) -> Path:
    """Return a directory with the model's config, and headers of its weights where they are here; no weight is read,
    built or downloaded. ``folder`` is an empty one.

    Raises as :func:`pytest_llmload.worker.checkpoints.resolve.resolve`.
    """
    if model.startswith(PREFIX):
        write_json(folder / "config.json", config_of(model))
        return folder
    directory = Path(model).expanduser()
    return directory.resolve() if directory.is_dir() else download_outline(model, trust_remote_code=trust_remote_code)


def cut_folder(model: str, directory: Path, layers: int, folder: Path, *, trust_remote_code: bool) -> Path:
    """Return an empty ``folder``, filled with the outline of a model's first layers of each kind; ``directory`` is the
    model's own.

    Raises MachineError, in one sentence, where the model cannot be cut.
    """
    if model.startswith(PREFIX):
        config, _ = cut_config_of(config_of(model), layers, trust_remote_code=trust_remote_code)
        write_json(folder / "config.json", config)
    else:
        cut_outline(directory, layers, folder, trust_remote_code=trust_remote_code)
    return folder


#: What of a LoadSpec decides how many bytes its weights take; the rest decides where they lie.
_FORMAT = ("quant", "dtype", "double_quant", "compute_dtype", "skip_modules", "quant_config", "auto_class")


def weights_in(directory: Path, fields: Mapping[str, Any], *, trust_remote_code: bool) -> int:
    """Return the bytes of a model's weights as a way of loading keeps them, from its config alone; as its files keep
    them, where the bytes of that way are not known.
    """
    gpus = (Gpu("planned", "planned", 1 << 40, (8, 0)),)

    def planned(way: Mapping[str, Any]) -> LoadPlan:
        spec = LoadSpec(model="m", name="m", **way)
        return plan_load(planned_job(spec, directory, gpus, trust_remote_code), Placement())

    wanted = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    try:
        found = planned({name: value for name, value in wanted.items() if name in _FORMAT})
    except (ValueError, ImportError):
        found = planned({})
    if not found.known:
        found = planned({})
    return sum(piece.bytes for piece in found.pieces)


def overview(
    model: str,
    directory: Path,
    gpus: tuple[Gpu, ...],
    workload: Workload,
    asked: Sequence[Asked],
    *,
    trust_remote_code: bool = False,
) -> Overview:
    """Return what ways of loading the model take on these GPUs; the first one is all of it on one device."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    specs = [
        LoadSpec(model=model, name="m", workload=workload, **each.fields, gpu_count=each.gpu_count) for each in asked
    ]
    jobs = [planned_job(spec, directory, gpus, trust_remote_code) for spec in specs]
    whole = plan_load(jobs[0], asked[0].placement)
    cache = cache_of(config, load_dtype(jobs[0]).itemsize)
    text = config.get_text_config(decoder=True)
    return Overview(
        model_type=str(config.model_type),
        parameters=sum(piece.bytes for piece in whole.pieces if not piece.buffer) // load_dtype(jobs[0]).itemsize,
        cache_kinds=cache.kinds,
        cache_per_token=cache.bytes(1, 2) - cache.bytes(1, 1),
        cache_constant=2 * cache.bytes(1, 1) - cache.bytes(1, 2),
        context=int(getattr(text, "max_position_embeddings", 0) or 0),
        ways=tuple(_way(job, each.placement, config) for job, each in zip(jobs, asked, strict=True)),
    )


def planned_job(spec: LoadSpec, directory: Path, gpus: tuple[Gpu, ...], trust_remote_code: bool) -> Job:
    """Return a load that is only planned."""
    device = Device("cuda", "planned", gpus[: spec.gpu_count])
    checkpoint = Checkpoint(str(directory), "", "")
    return Job(spec, device, checkpoint, trust_remote_code=trust_remote_code)


def _way(job: Job, placement: Placement, config: Any) -> Way:
    try:
        planned = plan_load(job, placement)
    except (ValueError, ImportError, LoadFailed, OSError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        return Way(job.spec.slug, problem=first)
    return way_of(job, config, planned.metrics(job), dict(_places(planned)))


def way_of(job: Job, config: Any, figures: dict[str, float], places: dict[str, str]) -> Way:
    """Return a way of loading whose figures are known: whether it fits, and what fits beside it."""
    workload, cache = job.spec.workload, cache_of(config, load_dtype(job).itemsize)
    length = workload.prompt_tokens + workload.new_tokens
    room = _Room(job, config, cache, figures)
    return Way(
        job.spec.slug,
        figures=figures,
        fits=room.left >= room.needed(workload.batch, length),
        cache=cache.bytes(workload.batch, length),
        working=room.working(workload.batch, workload.prompt_tokens),
        tokens=_largest(lambda tokens: room.left >= room.needed(1, tokens), _MOST_TOKENS),
        batch=_largest(lambda batch: room.left >= room.needed(batch, length), _MOST_BATCH),
        places=places,
    )


class _Room:
    """What the fullest GPU has left, and what sequences need of it."""

    def __init__(self, job: Job, config: Any, cache: Cache, figures: Mapping[str, float]) -> None:
        text = config.get_text_config(decoder=True)
        self._text, self._cache = text, cache
        settled = [figures.get(f"gpu.{gpu}.settled", 0.0) for gpu in range(job.spec.gpu_count)]
        totals = [gpu.total - CONTEXT for gpu in job.device.gpus]
        self.left = int(min(total - held for total, held in zip(totals, settled, strict=True)))
        # Each GPU has the cache of its own layers, or of its own heads.
        self._share = 1 / max(sum(held > 0 for held in settled), 1)

    def needed(self, batch: int, tokens: int) -> int:
        """Return the bytes beside the weights."""
        return int(self._cache.bytes(batch, tokens) * self._share) + self.working(batch, tokens)

    def working(self, batch: int, tokens: int) -> int:
        """Return the bytes of the widest moment of a prefill.

        These are a block's intermediate results, and the last token's logits in fp32 with their copy. A block needs the
        hidden state and its residual, and twice the widest projection, for each token. Attention is computed without a
        matrix of scores (sdpa).
        """
        text, size = self._text, self._cache.itemsize
        hidden = text.hidden_size
        wide = max(int(getattr(text, name, 0) or 0) for name in ("intermediate_size", "n_inner", "ffn_dim"))
        wide = wide or 4 * hidden
        needed: int = batch * (tokens * (4 * hidden + 2 * wide) * size + 2 * text.vocab_size * 4)
        return needed


def _largest(fits: Any, most: int) -> int:
    """Return the largest number up to ``most`` that fits; 0 where not even 1 does."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, high * 2
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _places(planned: LoadPlan) -> Iterator[tuple[str, str]]:
    """Yield where each block goes: ``GPU 0: model.embed_tokens, layers 0-20``."""
    found: dict[str, dict[str, list[int]]] = {}
    for module, device in planned.device_map.items():
        place = f"GPU {device}" if isinstance(device, int) else str(device)
        head, _, last = module.rpartition(".")
        if last.isdigit():
            found.setdefault(place, {}).setdefault(head, []).append(int(last))
        else:
            found.setdefault(place, {}).setdefault(module or "the whole model", [])
    for place, names in found.items():
        texts = (f"{name} {format_ranges(numbers)}" if numbers else name for name, numbers in names.items())
        yield place, ", ".join(texts)


def stored_bytes(directory: Path) -> int:
    """Return the bytes of the weight files that are here; 0 where there are none."""
    try:
        return sum(tensor.bytes for tensor in read_tensors(directory))
    except LoadFailed:
        return 0
