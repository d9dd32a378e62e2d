"""Check that the requested adapter is in the model, with the values of its file, and at work."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import counted, format_bytes, plural
from pytest_llmload.worker.adapters.attached import active_names
from pytest_llmload.worker.adapters.files import AdapterFiles, in_base
from pytest_llmload.worker.checks import merged
from pytest_llmload.worker.model.generation import first_forward
from pytest_llmload.worker.model.loaded import Loaded

CHECK = "adapter"


def _uninvited(loaded: Loaded) -> Iterator[Problem]:
    """Yield a problem where the model has an adapter although the test requests none."""
    own = loaded.inventory.wrapping.own
    if not own:
        return
    kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in loaded.attached.configs.values()}
    paths = tuple(loaded.inventory.wrapping.layers) or tuple(own)
    yield Problem(
        CHECK,
        f"a PEFT adapter ({', '.join(sorted(kinds)) or 'of an unknown kind'}) is in the model, in {len(paths)} "
        "modules, but the test requests none: name it with lora(...), or merge or leave it out while loading",
        paths,
        sum(held.nbytes for held in loaded.inventory.distinct() if loaded.inventory.is_adapter(held)),
    )


def check(loaded: Loaded) -> Iterator[Problem]:
    """Check that every tensor of the file is where it belongs, none is missing, and none is left over.

    The layers must be active and scaled. If the test requests no adapter, there must be none.
    """
    files = loaded.adapter
    if files is None:
        yield from _uninvited(loaded)
        return
    if not loaded.attached.is_there:
        if loaded.job.spec.adapter_merged:
            return
        if merged.is_merged(loaded):
            yield Problem(
                CHECK,
                "the adapter is merged into the model's weights, which was not requested; write lora(merged=True), or "
                "do not merge while loading",
            )
        else:
            yield Problem(CHECK, "there is no adapter in the model: peft wraps no layer of it and adds no prompt")
        return
    yield from _tensors(loaded, files)
    yield from _layers(loaded, files, loaded.attached.name)
    _note(loaded)


def output(loaded: Loaded) -> Iterator[Problem]:
    """Check that disabling the adapter changes the logits by more than two disabled forwards differ from each other.

    That alone proves little: half an adapter, or a random one in the place of the file's, changes the logits too.
    """
    attached = loaded.attached
    if loaded.adapter is None or not attached.is_there:
        return
    if any(getattr(layer, "merged", False) for layer in loaded.inventory.wrapping.layers.values()):
        return
    if not attached.stored(loaded.inventory.state()):
        # The check of its tensors says that there are none.
        return
    loaded.forget()
    heard = attached.tokens
    enabled = first_forward(loaded, heard).detach().float().cpu()
    with attached.disabled():
        first, second = (first_forward(loaded, heard).detach().float().cpu() for _ in range(2))
    # A learned prompt has logits of its own before those of the tokens.
    enabled = enabled[:, -first.shape[1] :]
    effect, noise = float((enabled - first).norm()), float((first - second).norm())
    relative = effect / max(float(first.norm()), 1e-30)
    if not math.isfinite(effect):
        yield Problem(CHECK, "the logits with the adapter, or those without it, are not finite")
    elif effect <= noise and _is_reached(loaded, heard):
        yield Problem(
            CHECK,
            "the adapter changes nothing: the logits with it and without it are "
            + ("the same" if not effect else f"as far apart as two runs without it ({relative:.1e} relative)")
            + _unused(loaded, heard),
        )
    elif effect <= noise:
        loaded.notes.append(
            "whether the adapter changes anything was not seen: the parts of the model that it tunes do not run for "
            "text"
        )
    else:
        loaded.notes.append(f"the adapter moves the logits by {relative:.2f} (relative)")


def _is_reached(loaded: Loaded, heard: tuple[int, ...]) -> bool:
    """Return whether a prompt of text runs a module that holds one which the adapter tunes; true if it tunes none.

    Whether that module calls the tuned one is not asked: an adapter that its owner passes by is dead.
    """
    owners = {path.rpartition(".")[0] for path in loaded.inventory.wrapping.tuned}
    if "" in owners or not owners:
        return True
    ran: set[str] = set()
    handles = [
        loaded.inventory.modules[path].register_forward_pre_hook(lambda module, args, path=path: ran.add(path))
        for path in owners
    ]
    try:
        first_forward(loaded, heard)
    finally:
        for handle in handles:
            handle.remove()
    return bool(ran)


def _unused(loaded: Loaded, heard: tuple[int, ...]) -> str:
    """Return that the model's own code throws away what the adapter's layers give; empty if they change nothing."""
    enabled = _layer_outputs(loaded, heard)
    with loaded.attached.disabled():
        disabled = _layer_outputs(loaded, heard)
    changed = [path for path, value in enabled.items() if path in disabled and value != disabled[path]]
    if not changed:
        return ""
    return (
        f", although {len(changed)} of the {counted(len(enabled), 'layer')} that it tunes "
        f"{plural(len(changed), 'gives', 'give')} other outputs: the model's own code does not use these"
    )


def _layer_outputs(loaded: Loaded, heard: tuple[int, ...]) -> dict[str, float]:
    """Return the norm of what each layer that the adapter tunes gives in a forward."""
    found: dict[str, float] = {}

    def look(path: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                found[path] = float(output.detach().double().norm())

        return hook

    handles = [layer.register_forward_hook(look(path)) for path, layer in loaded.inventory.wrapping.tuned.items()]
    try:
        first_forward(loaded, heard)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _tensors(loaded: Loaded, files: AdapterFiles) -> Iterator[Problem]:
    inventory = loaded.inventory
    held = {id(each.tensor): each for each in inventory.held if each.tensor is not None}
    stored = loaded.attached.stored(inventory.state())
    given: Mapping[str, Any] = files
    if not stored.keys() <= files.names.keys() and loaded.attached.renames:
        given = loaded.attached.converted({stored_as: files[name] for name, stored_as in files.names.items()})
    # A file may hold whole weights of the base: embeddings that were resized.
    own = {inventory.base_path(each): each.tensor for each in inventory.parameters()}
    placed = {name: stored.get(name, own.get(in_base(name))) for name in given}
    yield from _unplaced(loaded, files, [name for name, tensor in placed.items() if tensor is None])
    empty = {name: tensor for name, tensor in stored.items() if name not in given}
    if empty:
        known = [held[id(tensor)] for tensor in empty.values() if id(tensor) in held]
        yield Problem(
            CHECK,
            f"{len(empty)} of the adapter's {counted(len(stored), 'tensor')} in the model "
            f"{plural(len(empty), 'is left at its', 'are left at their')} initial values: its file has none for "
            f"{plural(len(empty), 'it', 'them')}",
            tuple(each.path for each in known) or tuple(empty),
            sum(each.nbytes for each in known),
        )
    found = {name: tensor for name, tensor in placed.items() if tensor is not None}
    shown = {name: held[id(t)].path if id(t) in held else name for name, t in found.items()}
    nowhere = [shown[name] for name, tensor in found.items() if tensor.device.type == "meta"]
    if nowhere:
        yield Problem(
            CHECK,
            f"{counted(len(nowhere), 'tensor')} of the adapter {plural(len(nowhere), 'is', 'are')} left without values "
            f"on meta: {plural(len(nowhere), 'its layer is', 'their layers are')} offloaded",
            tuple(nowhere),
        )
    wrong = [name for name, tensor in found.items() if not _equal(given[name], tensor, id(tensor) in held)]
    if wrong:
        yield Problem(
            CHECK,
            f"{len(wrong)} of {counted(len(found), 'tensor')} {plural(len(wrong), 'does', 'do')} not hold the values "
            "of the adapter's file" + _renamed(loaded, files),
            tuple(shown[name] for name in wrong),
            sum(found[name].nbytes for name in wrong),
        )


def _renamed(loaded: Loaded, files: AdapterFiles) -> str:
    """Return to which names that no layer has PEFT renames the file's tensors while it loads; empty if it does not."""
    if not loaded.attached.renames:
        return ""
    known = loaded.attached.stored(loaded.inventory.state())
    for name, stored_as in files.names.items():
        for renamed in loaded.attached.converted({stored_as: files[name]}):
            if name in known and renamed not in known:
                return (
                    f": PEFT renames them as transformers renames the tensors of such checkpoints, {name} to "
                    f"{renamed}, which no layer has"
                )
    return ""


def _unplaced(loaded: Loaded, files: AdapterFiles, names: list[str]) -> Iterator[Problem]:
    """Yield a problem for the tensors of the file that are nowhere in the model, by reason."""
    wrapping = loaded.inventory.wrapping
    known = {wrapping.base_module(path) for path in loaded.inventory.modules}
    tuned = {wrapping.base_module(path) for path in wrapping.layers}
    reasons: dict[str, list[str]] = defaultdict(list)
    for name in names:
        module = name.split(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
        if not module:
            reasons["the layers of the adapter share them, and what they share was not attached"].append(name)
        elif module not in known:
            reasons["the model has no such modules"].append(name)
        elif module not in tuned:
            targets = files.config.get("target_modules")
            reasons[f"its config targets other modules ({_short(targets)})"].append(name)
        else:
            reasons["the layers there have no such part"].append(name)
    for reason, found in reasons.items():
        yield Problem(
            CHECK,
            f"{len(found)} of {counted(len(files.names), 'tensor')} of the adapter's file "
            f"{plural(len(found), 'is', 'are')} not in the model: {reason}",
            tuple(found),
        )


def _short(targets: Any) -> str:
    return ", ".join(sorted(map(str, targets))[:6]) if isinstance(targets, list) else str(targets)


def _equal(original: Any, tensor: Any, is_kept: bool) -> bool:
    """Return whether a tensor of the file is in the model, exactly after the cast to the dtype that it has there.

    One that PEFT computes from others when it saves is equal within the rounding of its dtype. A shard is its
    strategy's to judge, and what is on meta was named already.
    """
    if tensor.device.type == "meta" or hasattr(tensor, "to_local"):
        return True
    value = tensor.detach().cpu()
    if original.shape != value.shape:
        return False
    original = original.to(value.dtype)
    if is_kept or not value.dtype.is_floating_point:
        # What is not a number in the file is for the check of finite values to tell.
        return bool(((original == value) | ((original != original) & (value != value))).all())
    return bool(torch.allclose(original, value, rtol=8 * torch.finfo(value.dtype).eps, atol=1e-6, equal_nan=True))


def _layers(loaded: Loaded, files: AdapterFiles, name: str) -> Iterator[Problem]:
    """Check that this adapter alone is active in its layers, and as requested.

    It is not disabled, merged only if the test requests that, and scaled as its config says.
    """
    asked = loaded.job.spec.adapter_merged
    wrong: dict[str, list[str]] = defaultdict(list)
    wrapping = loaded.inventory.wrapping
    for path, layer in wrapping.layers.items():
        if layer.disable_adapters:
            wrong["disabled"].append(path)
        elif name not in active_names(layer):
            wrong[f"not active (active: {', '.join(active_names(layer)) or 'none'})"].append(path)
        elif active_names(layer) != [name]:
            others = ", ".join(other for other in active_names(layer) if other != name)
            wrong[f"not alone: {others} is active beside it"].append(path)
        if path not in wrapping.tuned:
            continue
        if bool(layer.merged) != asked:
            wrong["not merged" if asked else "merged into the weights, which was not requested"].append(path)
        scaling = getattr(layer, "scaling", {}).get(name)
        if scaling is None:
            continue
        if not scaling:
            wrong["scaled by 0, so it does nothing"].append(path)
        expected = _expected_scaling(files, wrapping.base_module(path) or "")
        if scaling and expected is not None and abs(scaling - expected) > 1e-6 * expected:
            wrong[f"scaled by {scaling:g}, its config says {expected:g}"].append(path)
    for what, paths in wrong.items():
        where = f"{len(paths)} of {counted(len(wrapping.layers), 'layer')}"
        yield Problem(CHECK, f"the adapter is {what}, in {where}", tuple(paths))


def _expected_scaling(files: AdapterFiles, module: str) -> float | None:
    """Return the adapter's scaling of the module; None where the file has no factors of a LoRA for it."""
    return files.scaling(module) if module in files.targets else None


def _note(loaded: Loaded) -> None:
    sizes: Counter[str] = Counter()
    count = 0
    for held in loaded.inventory.distinct():
        if loaded.inventory.is_adapter(held):
            sizes[held.dtype] += held.nbytes
            count += 1
    if sizes:
        what = ", ".join(f"{format_bytes(size)} in {dtype}" for dtype, size in sorted(sizes.items()))
        loaded.notes.append(f"the adapter holds {what} ({counted(count, 'tensor')})")
