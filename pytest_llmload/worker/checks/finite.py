"""Logits are finite, those of the first forward and of every generated token, and so are the stored weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import counted, format_bytes, plural
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.tensors import Held

CHECK = "finite"
#: Elements that are looked at at once.
_CHUNK = 1 << 22
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(loaded: Loaded) -> Iterator[Problem]:
    """Check that the first forward's logits are finite."""
    if loaded.logits is None or all(_are_finite([loaded.logits])):
        return
    wrong = int((~loaded.logits.isfinite()).sum())
    nans = int(loaded.logits.isnan().sum())
    what = f"{wrong} of {loaded.logits.numel()} logits of the first forward"
    yield Problem(CHECK, f"{what} {plural(wrong, 'is', 'are')} not finite ({nans} NaN)")


def weights(loaded: Loaded) -> Iterator[Problem]:
    """Check every floating weight in memory, and the statistics of quantised ones.

    What the checkpoint itself holds is noted. Reads all of them, each on its device: called after every figure has been
    taken.
    """
    found: list[str] = []
    size = 0
    stored_tensors = list(_stored(loaded))
    for (held, _, name), finite in zip(stored_tensors, _are_finite([each[1] for each in stored_tensors]), strict=True):
        if finite:
            continue
        if name == held.name and _is_so_in_file(loaded, held):
            loaded.notes.append(f"{held.path} is not finite, as the checkpoint has it")
            continue
        if loaded.inventory.is_adapter(held) and _is_made_so(loaded, held):
            continue
        where = f"{held.module}.{name}" if held.module else name
        found.append(f"{where} ({format_bytes(held.nbytes)})")
        size += held.nbytes
    if found:
        yield Problem(
            CHECK,
            f"{counted(len(found), 'stored weight holds', 'stored weights hold')} NaN or infinity",
            tuple(found),
            size,
        )


def _is_made_so(loaded: Loaded, held: Held) -> bool:
    """Return whether PEFT made an adapter's tensor of others in its file.

    PEFT fills in infinity for what the file leaves out.
    """
    in_file = loaded.attached.stored(loaded.inventory.state()).values()
    return not bool(held.tensor.isnan().any()) and all(tensor is not held.tensor for tensor in in_file)


def decoded(loaded: Loaded) -> Iterator[Problem]:
    """Check the logits of the workload's tokens, those after the first of which come from the cache."""
    monitor = loaded.logits_monitor
    if monitor is None:
        return
    if not monitor.wrong:
        loaded.notes.append("the logits of generated tokens were not looked at: the model generates in its own way")
        return
    wrong = [number for number, row in enumerate(monitor.wrong, 1) if any(row)]
    if wrong:
        how = "the prefill's" if wrong[0] == 1 else "decoded after the prefill"
        yield Problem(
            CHECK,
            f"the logits of {len(wrong)} of {counted(len(monitor.wrong), 'generated token')} are not finite, "
            f"from token {wrong[0]} on ({how})",
        )


def _stored(loaded: Loaded) -> Iterator[tuple[Held, Any, str]]:
    """Yield floating tensors in memory that hold weights, each once, with the name in their module."""
    inventory = loaded.inventory
    seen: set[tuple[int, int]] = set()
    for held in inventory.held:
        if not held.in_state_dict or held.tensor is None or held.device == "meta":
            continue
        parts = [(held.tensor, held.name)]
        state = inventory.stored(held)
        if state is not None:
            parts = [(tensor, f"{held.name}'s {name}") for name, tensor in state.statistics()]
        for tensor, name in parts:
            if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _FLOATING or not tensor.numel():
                continue
            place = (tensor.data_ptr(), tensor.numel())
            if place not in seen:
                seen.add(place)
                yield held, tensor.detach(), name


def _chunks(tensor: Any) -> Any:
    """Return a tensor in parts, none of them a copy."""
    if tensor.is_contiguous():
        return tensor.reshape(-1).split(_CHUNK)
    return tensor.split(max(1, _CHUNK // tensor[0].numel()))


def _are_finite(tensors: Sequence[Any]) -> list[bool]:
    """Return of each tensor whether all its values are finite; the answers of a device come to the host in one copy.

    The smallest and the largest value are not finite where any is not: one pass, and no copy.
    """
    ends: dict[tuple[Any, Any], list[Any]] = defaultdict(list)
    numbers: dict[tuple[Any, Any], list[int]] = defaultdict(list)
    for number, tensor in enumerate(tensors):
        place = tensor.device, tensor.dtype
        for chunk in _chunks(tensor):
            ends[place] += torch.aminmax(chunk)
            numbers[place] += (number, number)
    finite = [True] * len(tensors)
    for place, values in ends.items():
        for number, is_finite in zip(numbers[place], torch.stack(values).isfinite().tolist(), strict=True):
            finite[number] &= is_finite
    return finite


def _is_so_in_file(loaded: Loaded, held: Held) -> bool:
    """Return whether the checkpoint has the same where the first value is that is not finite."""
    names = loaded.checkpoint_names
    name = names.find(loaded.inventory.base_path(held))
    if name is None or tuple(names.files.slice(name).get_shape()) != held.shape:
        return False
    start = 0
    for chunk in _chunks(held.tensor.detach()):
        wrong = ~chunk.isfinite()
        if bool(wrong.any()):
            place = start + int(wrong.reshape(-1).int().argmax())
            return not bool(names.files.block(name, place, place + 1).isfinite().all())
        start += chunk.numel()
    return False
