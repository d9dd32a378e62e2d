"""What a load will hold where, from the architecture alone: on the meta device, before any weight is read.

transformers itself builds the model, replaces the modules that its quantiser would replace, and infers device maps;
what is left to know here is how many bytes a quantisation method makes of a weight and how CUDA's allocator rounds.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pytest_llmload.core.dtypes import TORCH_NAMES
from pytest_llmload.core.job import Job
from pytest_llmload.core.references import resolve
from pytest_llmload.core.spec import AS_STORED, BY_CONFIG
from pytest_llmload.quantisation.registry import keep_offloaded_dense, method_of, method_of_config, with_default_skips
from pytest_llmload.worker.adapters.plan import adapter_tensors
from pytest_llmload.worker.checkpoints.architecture import meta_model
from pytest_llmload.worker.checkpoints.digests import read_config
from pytest_llmload.worker.checkpoints.weights import read_tensors
from pytest_llmload.worker.planning.placement import (
    Blocks,
    Placement,
    device_limits,
    lookup,
)

#: CUDA's caching allocator hands out multiples of this (c10/cuda/CUDACachingAllocator.cpp, ``kMinBlockSize``).
ROUNDING = 512
_FP32 = 4


@dataclass(frozen=True)
class PlannedStorage:
    """One storage that the loaded model will hold."""

    module: str
    name: str
    bytes: int
    #: Buffers stay where their module computes even when its weights are offloaded.
    buffer: bool = False
    #: False for a weight that will be quantised, of whose method the bytes are not known.
    known: bool = True


@dataclass(frozen=True)
class LoadPlan:
    """A load before it happens."""

    pieces: tuple[PlannedStorage, ...]
    #: Module -> GPU number, ``cpu`` or ``disk``; ``""`` is the whole model.
    device_map: dict[str, int | str]
    #: Limits in bytes that the map was inferred under; empty where there are none.
    max_memory: dict[int | str, int]
    #: False if the method does not say what it makes of some weight, which then counts as it is before.
    known: bool = True

    def metrics(self, job: Job) -> dict[str, float]:
        """Return the predicted metrics by their names, in bytes.

        ``gpu.settled``, ``gpu.0.settled`` …, ``gpu.weights``, ``host.weights``, ``weights.logical``, ``disk``.
        """
        held: Counter[int | str] = Counter()
        settled: Counter[int | str] = Counter()
        main = next((device for device in self.device_map.values() if isinstance(device, int)), "cpu")
        for piece in self.pieces:
            device = lookup(self.device_map, f"{piece.module}.{piece.name}" if piece.module else piece.name, "cpu")
            if piece.buffer and not isinstance(device, int):
                device = main
            held[device] += piece.bytes
            settled[device] += -(-piece.bytes // ROUNDING) * ROUNDING
        found: dict[str, float] = {
            "host.weights": held["cpu"],
            "weights.logical": sum(held.values()),
            "disk": held["disk"],
        }
        if job.device.kind == "cuda":
            gpus = range(max(job.spec.gpu_count, 1))
            found |= {f"gpu.{gpu}.weights": held[gpu] for gpu in gpus}
            found |= {f"gpu.{gpu}.settled": settled[gpu] for gpu in gpus}
            found |= {"gpu.weights": sum(held[gpu] for gpu in gpus), "gpu.settled": sum(settled[gpu] for gpu in gpus)}
        return found


def plan(job: Job, placement: Placement) -> dict[str, float]:
    """Predict the metrics of a load in bytes, by their names; ``disk`` is what stays in files.

    Empty if the installed libraries cannot quantise it, or its method does not say what it makes of a weight. Raises as
    :func:`plan_load`.
    """
    try:
        planned = plan_load(job, placement)
    except NotImplementedError:
        return {}
    if not planned.known:
        return {}
    size = load_dtype(job).itemsize
    adapter = tuple(PlannedStorage(module, name, count) for module, name, count in adapter_tensors(job, size))
    found = dataclasses.replace(planned, pieces=planned.pieces + adapter).metrics(job)
    return found if job.adapter is None else {**found, "weights.adapter": sum(piece.bytes for piece in adapter)}


def plan_load(job: Job, placement: Placement) -> LoadPlan:
    """Return the pieces, the device map and the limits of a load; a load whose map is not given uses the same ones.

    Raises ValueError if the installed transformers does not know the architecture or refuses the map, ImportError if a
    quantiser is not installed, and NotImplementedError if the libraries cannot quantise while loading.
    """
    directory, spec = Path(job.checkpoint.path), job.spec
    dtype = load_dtype(job)
    model = meta_model(directory, trust_remote_code=job.trust_remote_code, dtype=dtype, auto_class=spec.auto_class)
    pinned = _pinned(model, dtype)
    given = json.loads(spec.device_map) if spec.device_map is not None else None
    device_map: dict[str, int | str] | None = None
    if isinstance(given, dict):
        device_map = {module: _device(value) for module, value in given.items()}
    if device_map is None and placement.default_map is not None:
        device_map = placement.default_map(job, blocks(model, _pieces(model, pinned)))
    elif given is None and not placement.divides:
        device_map = {"": 0 if job.device.kind == "cuda" else "cpu"}
    quantiser = _quantise(model, job, placement, device_map, dtype)
    pieces = tuple(_stored_pieces(directory) if _prequantised(directory) else _pieces(model, pinned, quantiser))
    known = all(piece.known for piece in pieces)
    if device_map is not None:
        return LoadPlan(pieces, device_map, {}, known)
    limits = device_limits(job)
    if placement.default_limits is not None and not spec.max_memory:
        limits = placement.default_limits(job, sum(piece.bytes for piece in pieces), blocks(model, pieces).largest)
    kind = given or placement.inferred
    return LoadPlan(pieces, _inferred(model, kind, limits, quantiser, dtype), limits, known)


def _device(value: int | str) -> int | str:
    """Return the device of a map's entry: ``cuda:1`` is GPU 1; ``cpu`` and ``disk`` are themselves."""
    kind, _, number = str(value).partition(":")
    return int(number or 0) if kind == "cuda" else value


def load_dtype(job: Job) -> Any:
    """Return the torch dtype that ``from_pretrained(dtype="auto")``, or the spec's dtype, gives the parameters."""
    import torch

    if job.spec.dtype:
        return getattr(torch, TORCH_NAMES[job.spec.dtype])
    directory = Path(job.checkpoint.path)
    config = read_config(directory)
    texts = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    for part in texts:
        name = part.get("dtype") or part.get("torch_dtype")
        if isinstance(name, str):
            return getattr(torch, name.removeprefix("torch."))
    floating = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return next(
        (floating[tensor.dtype] for tensor in read_tensors(directory) if tensor.dtype in floating), torch.float32
    )


def _pinned(model: Any, dtype: Any) -> tuple[str, ...]:
    """Return names of modules, parameters and stored buffers that the class keeps in fp32 (transformers,
    ``_keep_in_fp32_modules``).
    """
    import torch

    names: list[str] = []
    if dtype == torch.float16:
        names += model._keep_in_fp32_modules or ()
    if dtype in (torch.float16, torch.bfloat16):
        names += model._keep_in_fp32_modules_strict or ()
    return tuple(names)


@contextmanager
def _default_dtype(dtype: Any) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _quantise(model: Any, job: Job, placement: Placement, device_map: dict[str, int | str] | None, dtype: Any) -> Any:
    """Replace modules as the scheme's quantiser in transformers would; return the quantiser, or None."""
    if job.spec.quant == AS_STORED:
        return None
    from transformers.quantizers import AutoHfQuantizer

    config = _config(job, with_default_skips(model, job.spec.skip_modules))
    keep_offloaded_dense(job, device_map, config, offloads=placement.offloads)
    quantiser = AutoHfQuantizer.from_config(config, pre_quantized=False)
    with _default_dtype(dtype):
        quantiser.preprocess_model(
            model=model, device_map=device_map, dtype=dtype, keep_in_fp32_modules=model._keep_in_fp32_modules
        )
    return quantiser


def _config(job: Job, skipped: tuple[str, ...]) -> Any:
    """Return the ``quantization_config`` of a load: its method's, or that of the user's own function."""
    if job.spec.quant == BY_CONFIG:
        assert job.spec.quant_config is not None
        return resolve(job.spec.quant_config)(job.spec)
    return method_of(job.spec.quant).config(job, job.spec.quant, skipped)


def _pieces(model: Any, pinned: tuple[str, ...], quantiser: Any = None) -> Iterator[PlannedStorage]:
    """Yield the storages of a model on the meta device, as its quantiser will leave them."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        fp32 = any(name in path.split(".") or f".{name}." in f".{path}." for name in pinned)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            buffer = name in module._buffers
            size = tensor.element_size()
            stored = not buffer or name not in module._non_persistent_buffers_set
            if stored and tensor.is_floating_point() and (fp32 or name in pinned):
                size = _FP32
            made, known = None, True
            if quantiser is not None and not buffer:
                replaced = bool(quantiser.param_needs_quantization(model, f"{path}.{name}" if path else name))
                made = _made(module, tensor, replaced, quantiser.quantization_config)
                known = made is not None or not replaced
            for suffix, count in (made or {"": tensor.numel() * size}).items():
                yield PlannedStorage(path, name + suffix, count, buffer, known)


def _made(module: Any, weight: Any, replaced: bool, config: Any) -> dict[str, int] | None:
    """Return the storages that the method of a ``quantization_config`` makes of a weight, in bytes; None for a dense
    one.
    """
    method = method_of_config(config)
    return method.planned(module, weight, replaced=replaced, config=config) if method is not None else None


def _prequantised(directory: Path) -> bool:
    return bool(read_config(directory).get("quantization_config"))


def _stored_pieces(directory: Path) -> Iterator[PlannedStorage]:
    """Yield the tensors of the files of a checkpoint that is quantised already, each as it is."""
    for tensor in read_tensors(directory):
        module, _, name = tensor.name.rpartition(".")
        yield PlannedStorage(module, name, tensor.bytes)


def blocks(model: Any, pieces: Iterable[PlannedStorage]) -> Blocks:
    """Return what a device map places as a whole, in the order of the forward pass, with its bytes.

    Those are modules, and the tensors that stand directly on a module which is divided: an entry for that module itself
    would have accelerate put hooks around all of it.
    """
    whole = set(getattr(model, "_no_split_modules", None) or ())
    sizes: Counter[str] = Counter()
    places: dict[int, set[str]] = defaultdict(set)

    def visit(path: str, module: Any) -> None:
        children = list(module.named_children())
        numbered = any(part.isdigit() for part in path.split("."))
        # A tensor of its own follows its module only if that is placed as a whole.
        owns = any(each is not None for each in module._parameters.values())
        if type(module).__name__ in whole or not children or (numbered and owns):
            sizes[path] = 0
            for parameter in module.parameters():
                places[id(parameter)].add(path)
        for name, child in children if path not in sizes else ():
            visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    for piece in pieces:
        owner = piece.module
        while owner not in sizes and owner:
            owner = owner.rpartition(".")[0]
        direct = f"{piece.module}.{piece.name}" if piece.module else piece.name
        sizes[owner if owner in sizes else direct] += piece.bytes
    shared = {path for paths in places.values() if len(paths) > 1 for path in paths}
    return Blocks(dict(sizes), frozenset(shared))


@contextmanager
def _numbers_are_gpus() -> Iterator[None]:
    """Have accelerate take the numbers of GPUs for such on a machine without one.

    Until 1.14 it asks for the type of ``torch.device(0)``, which raises there (``get_balanced_memory``).
    """
    import torch
    from accelerate.utils import modeling

    class Torch(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def device(place: Any, *rest: Any) -> Any:
            return torch.device("cuda", place) if isinstance(place, int) else torch.device(place, *rest)

    modeling.torch = Torch("torch")
    try:
        yield
    finally:
        modeling.torch = torch


def _inferred(model: Any, kind: str, limits: dict[int | str, int], quantiser: Any, dtype: Any) -> dict[str, int | str]:
    """Return the map that transformers infers for ``auto``, ``balanced`` … under ``limits``."""
    found: dict[str, int | str]
    try:
        from transformers.integrations.accelerate import _get_device_map
    except ImportError:  # transformers 4
        from transformers.modeling_utils import _get_device_map

        with _numbers_are_gpus():
            found = _get_device_map(model, kind, dict(limits), quantiser, dtype, None)
    else:
        found = _get_device_map(model, kind, dict(limits), quantiser)
    return found
