"""The adapter that was asked for is in the model, with the values of its file, and at work."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import format_bytes
from pytest_llmload.worker.adapters.files import AdapterFiles
from pytest_llmload.worker.model.generation import first_forward
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.tensors import BUFFER, PARAMETER, Held

CHECK = "adapter"


@dataclass(frozen=True)
class _Part:
    """A tensor that an adapter brought."""

    held: Held
    #: The adapter's name in the model: ``default``.
    adapter: str
    #: Names that the adapter's file may give it, without PEFT's prefix.
    stored: tuple[str, ...]


def check(loaded: Loaded) -> Iterator[Problem]:
    """Every tensor of the file where it belongs, none missing, none left over; the layers active and scaled."""
    files = loaded.adapter
    if files is None:
        return
    wrapping = loaded.inventory.wrapping
    if not wrapping.layers:
        if not loaded.job.spec.adapter_merged:
            yield Problem(CHECK, "there is no adapter in the model: no layer of it is wrapped by peft")
        return
    parts = list(_parts(loaded))
    name = _chosen(loaded, parts)
    mine = [part for part in parts if part.adapter == name]
    yield from _tensors(loaded, files, mine)
    yield from _layers(loaded, files, name)
    _note(loaded, parts)


def output(loaded: Loaded) -> Iterator[Problem]:
    """With the adapter disabled the logits differ by more than two such forwards differ from each other.

    That alone proves little: half an adapter, or a random one in the place of the file's, changes the logits too.
    """
    layers = loaded.inventory.wrapping.layers
    if loaded.adapter is None or not layers or any(getattr(layer, "merged", False) for layer in layers.values()):
        return
    loaded.forget()
    enabled = first_forward(loaded).detach().float().cpu()
    with _disabled(list(layers.values())):
        first, second = (first_forward(loaded).detach().float().cpu() for _ in range(2))
    effect, noise = float((enabled - first).norm()), float((first - second).norm())
    relative = effect / max(float(first.norm()), 1e-30)
    if not math.isfinite(effect):
        yield Problem(CHECK, "the logits with the adapter, or those without it, are not finite")
    elif effect <= noise:
        yield Problem(
            CHECK,
            "the adapter changes nothing: the logits with it and without it are "
            + ("the same" if not effect else f"as far apart as two runs without it ({relative:.1e} relative)"),
        )
    else:
        loaded.notes.append(f"the adapter moves the logits by {relative:.2f} (relative)")


def _parts(loaded: Loaded) -> Iterator[_Part]:
    """``q_proj.lora_A.default.weight`` of the model is ``q_proj.lora_A.weight`` in the file."""
    inventory = loaded.inventory
    wrapping = inventory.wrapping
    for held in inventory.held:
        if held.role not in (PARAMETER, BUFFER) or not inventory.is_adapter(held):
            continue
        layer = _layer_of(held.path, wrapping.layers)
        if layer is None:
            continue
        base = wrapping.base_module(layer) or ""
        kind, _, rest = held.path[len(layer) + 1 :].partition(".")
        adapter, dot, leaf = rest.partition(".")
        stored = [f"{kind}{dot}{leaf}", kind] if layer in wrapping.tuned else [leaf, f"{kind}{dot}{leaf}"]
        yield _Part(held, adapter, tuple(f"{base}.{name}" if base else name for name in stored))


def _layer_of(path: str, layers: dict[str, Any]) -> str | None:
    """The nearest wrapper above a tensor."""
    while path:
        path = path.rpartition(".")[0]
        if path in layers:
            return path
    return None


def _chosen(loaded: Loaded, parts: list[_Part]) -> str:
    """The adapter that is held against the file, where a loader attached several: the active one, else the first."""
    names = list(dict.fromkeys(part.adapter for part in parts))
    active = {name for layer in loaded.inventory.wrapping.layers.values() for name in _active(layer)}
    return next((name for name in names if name in active), names[0] if names else "default")


def _active(layer: Any) -> list[str]:
    names = layer.active_adapters if hasattr(layer, "active_adapters") else layer.active_adapter
    return [names] if isinstance(names, str) else list(names)


def _tensors(loaded: Loaded, files: AdapterFiles, parts: list[_Part]) -> Iterator[Problem]:
    inventory = loaded.inventory
    own = {inventory.base_path(held): held for held in inventory.parameters()}
    placed: dict[str, Held] = {}
    empty: list[_Part] = []
    for part in parts:
        name = next((name for name in part.stored if name in files.names), None)
        if name is None:
            empty.append(part)
        else:
            placed[name] = part.held
    # A file may hold whole weights of the base: embeddings that were resized.
    placed |= {name: own[name] for name in files.names if name not in placed and name in own}
    yield from _unplaced(loaded, files, [name for name in files.names if name not in placed])
    if empty:
        size = sum(part.held.nbytes for part in empty)
        yield Problem(
            CHECK,
            f"{len(empty)} of the adapter's {len(parts)} tensors in the model are left at their initial values: its "
            "file has none for them",
            tuple(part.held.path for part in empty),
            size,
        )
    nowhere = [held for held in placed.values() if held.device == "meta"]
    if nowhere:
        yield Problem(
            CHECK,
            f"{len(nowhere)} of the adapter's tensors are left without values on meta: their layers are offloaded",
            tuple(held.path for held in nowhere),
        )
    wrong = [held for name, held in placed.items() if held.device != "meta" and not _equal(files, name, held)]
    if wrong:
        yield Problem(
            CHECK,
            f"{len(wrong)} of {len(placed)} tensors do not hold the values of the adapter's file",
            tuple(held.path for held in wrong),
            sum(held.nbytes for held in wrong),
        )


def _unplaced(loaded: Loaded, files: AdapterFiles, names: list[str]) -> Iterator[Problem]:
    """Tensors of the file that are nowhere in the model, by reason."""
    wrapping = loaded.inventory.wrapping
    known = {wrapping.base_module(path) for path in loaded.inventory.modules}
    tuned = {wrapping.base_module(path) for path in wrapping.layers}
    reasons: dict[str, list[str]] = defaultdict(list)
    for name in names:
        module = name.split(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
        if module not in known:
            reasons["the model has no such modules"].append(name)
        elif module not in tuned:
            targets = files.config.get("target_modules")
            reasons[f"its config targets other modules ({_short(targets)})"].append(name)
        else:
            reasons["the layers there have no such part"].append(name)
    for reason, found in reasons.items():
        yield Problem(
            CHECK,
            f"{len(found)} of {len(files.names)} tensors of the adapter's file are not in the model: {reason}",
            tuple(found),
        )


def _short(targets: Any) -> str:
    return ", ".join(sorted(map(str, targets))[:6]) if isinstance(targets, list) else str(targets)


def _equal(files: AdapterFiles, name: str, held: Held) -> bool:
    """Exactly, after the cast to the dtype that the model keeps it in. A shard is its strategy's to judge."""
    if held.tensor is None:
        # On disk, where a hook reads it from at every forward.
        return True
    if held.nbytes != held.whole_bytes:
        return True
    original = files.tensor(name).to(held.tensor.dtype)
    value = held.tensor.detach().cpu()
    return original.shape == value.shape and bool((original == value).all())


def _layers(loaded: Loaded, files: AdapterFiles, name: str) -> Iterator[Problem]:
    """Active and no other is, not disabled, merged only where that was asked for, and scaled as the config says."""
    asked = loaded.job.spec.adapter_merged
    wrong: dict[str, list[str]] = defaultdict(list)
    wrapping = loaded.inventory.wrapping
    for path, layer in wrapping.layers.items():
        if layer.disable_adapters:
            wrong["disabled"].append(path)
        elif name not in _active(layer):
            wrong[f"not active (active: {', '.join(_active(layer)) or 'none'})"].append(path)
        elif _active(layer) != [name]:
            others = ", ".join(other for other in _active(layer) if other != name)
            wrong[f"not alone: {others} is active beside it"].append(path)
        if path not in wrapping.tuned:
            continue
        if bool(layer.merged) != asked:
            wrong["not merged" if asked else "merged into the weights, which was not asked for"].append(path)
        scaling = getattr(layer, "scaling", {}).get(name)
        if scaling is None:
            continue
        if not scaling:
            wrong["scaled by 0, so it does nothing"].append(path)
        expected = _expected_scaling(files, wrapping.base_module(path) or "")
        if scaling and expected is not None and abs(scaling - expected) > 1e-6 * expected:
            wrong[f"scaled by {scaling:g}, its config says {expected:g}"].append(path)
    for what, paths in wrong.items():
        yield Problem(CHECK, f"the adapter is {what}, in {len(paths)} of {len(wrapping.layers)} layers", tuple(paths))


def _expected_scaling(files: AdapterFiles, module: str) -> float | None:
    """None where the file has no factors of a LoRA for the module."""
    return files.scaling(module, files.factors(module)[0].shape[0]) if module in files.targets else None


def _note(loaded: Loaded, parts: list[_Part]) -> None:
    sizes: Counter[str] = Counter()
    for part in parts:
        sizes[part.held.dtype] += part.held.nbytes
    if sizes:
        what = ", ".join(f"{format_bytes(size)} in {dtype}" for dtype, size in sorted(sizes.items()))
        loaded.notes.append(f"the adapter holds {what} ({len(parts)} tensors)")


@contextmanager
def _disabled(layers: list[Any]) -> Iterator[None]:
    """The model without its adapters; enabling them again makes them trainable, which is undone."""
    trained = [(param, param.requires_grad) for layer in layers for param in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for param, requires_grad in trained:
            param.requires_grad_(requires_grad)
