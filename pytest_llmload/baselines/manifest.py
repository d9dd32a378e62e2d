"""Describe the differences between two manifests in readable sentences.

``160 x Linear4bit: double quant dropped, absmax uint8 -> float32 (+542.72 MiB)``
``model.layers.20-39.*: cuda:0 -> cpu``
``model.layers.3.mlp.up_proj: quantised nf4 -> dense bfloat16 (+12.00 MiB)``
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pytest_llmload.core.results import ManifestRow
from pytest_llmload.core.units import format_bytes, format_change, format_ranges
from pytest_llmload.core.verdicts import ManifestChange

#: More names than this are counted instead of listed.
_NAMES = 3


@dataclass(frozen=True)
class _State:
    """The state of one module that is compared."""

    cls: str
    dtype: str
    device: str
    quant: str
    #: Bytes of one module; a row's bytes may not divide evenly.
    bytes: float


@dataclass(frozen=True)
class _Key:
    """The key of one module: its row's pattern, and the number that the ``*`` stands for (None without a ``*``)."""

    pattern: str
    index: int | None


#: The state of a module that is not there, before it was added or after it was removed.
_ABSENT = _State("", "", "", "", 0)
#: A module's states before and after.
_Transition = tuple[_State, _State]


def diff(old: Sequence[ManifestRow], new: Sequence[ManifestRow]) -> tuple[ManifestChange, ...]:
    """Return every difference, the one that changes most bytes first.

    Equal manifests do not give any, however their rows are split.
    """
    before, after = _modules(old), _modules(new)
    groups: dict[tuple[str, str], list[tuple[_Key, _Transition]]] = defaultdict(list)
    for key in {**before, **after}:
        transition = (before.get(key, _ABSENT), after.get(key, _ABSENT))
        if transition[0] != transition[1]:
            groups[_group(transition)].append((key, transition))
    everything = len(before)
    changes = [
        change
        for (cls, what), members in groups.items()
        for change in _changes(cls, what, members, before or after, everything)
    ]
    return tuple(sorted(changes, key=lambda change: (-abs(change.bytes), -change.modules, change.text)))


def _modules(rows: Iterable[ManifestRow]) -> dict[_Key, _State]:
    modules = {}
    for row in rows:
        indices: list[int | None] = [*_numbers(row.indices)] or [None]
        each = row.bytes / len(indices)
        for index in indices:
            modules[_Key(row.module, index)] = _State(row.cls, row.dtype, row.device, row.quant, each)
    return modules


def _numbers(indices: str) -> Iterable[int]:
    for part in filter(None, indices.split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _group(transition: _Transition) -> tuple[str, str]:
    """Return what similar changes share: the class, if it matters, and the sentence."""
    old, new = transition
    if old is _ABSENT:
        return new.cls, f"added, {_kind(new)} on {new.device}"
    if new is _ABSENT:
        return old.cls, f"removed, was {_kind(old)} on {old.device}"
    # The device of a module does not depend on its class: whole layers move together.
    only_moved = (old.cls, old.dtype, old.quant) == (new.cls, new.dtype, new.quant) and old.device != new.device
    return "" if only_moved else old.cls, ", ".join(_differences(old, new))


def _differences(old: _State, new: _State) -> Iterable[str]:
    if bool(old.quant) != bool(new.quant):
        # The class and the stored dtype follow from the quantisation.
        yield f"{_kind(old)} -> {_kind(new)}"
    else:
        if old.quant != new.quant:
            yield from _quant_differences(old.quant, new.quant)
        if old.cls != new.cls:
            yield f"now {new.cls}"
        if old.dtype != new.dtype:
            yield f"{old.dtype} -> {new.dtype}"
    if old.device != new.device:
        yield f"{old.device} -> {new.device}"
    if (old.cls, old.dtype, old.device, old.quant) == (new.cls, new.dtype, new.device, new.quant):
        yield f"{format_bytes(old.bytes)} -> {format_bytes(new.bytes)} each"


def _kind(state: _State) -> str:
    return f"quantised {state.quant.split()[0]}" if state.quant else f"dense {state.dtype}".strip()


def _quant_differences(old: str, new: str) -> Iterable[str]:
    (old_scheme, old_flags, old_values), (new_scheme, new_flags, new_values) = _quant(old), _quant(new)
    if old_scheme != new_scheme:
        yield f"quantised {old_scheme} -> {new_scheme}"
    names = {"nested": "double quant"}
    yield from (f"{names.get(flag, flag)} dropped" for flag in sorted(old_flags - new_flags))
    yield from (f"{names.get(flag, flag)} added" for flag in sorted(new_flags - old_flags))
    for name in sorted({**old_values, **new_values}):
        before, after = old_values.get(name, "none"), new_values.get(name, "none")
        if before != after:
            yield f"{name} {before} -> {after}"


def _quant(text: str) -> tuple[str, set[str], dict[str, str]]:
    """Split ``nf4 absmax=uint8 nested`` into scheme, flags and values."""
    scheme, *rest = text.split()
    return scheme, {item for item in rest if "=" not in item}, dict(item.split("=", 1) for item in rest if "=" in item)


def _changes(
    cls: str, what: str, members: list[tuple[_Key, _Transition]], modules: dict[_Key, _State], everything: int
) -> Iterable[ManifestChange]:
    if not cls and len(members) < everything:
        # Modules that only moved to a different device are named by place, with one sentence per place.
        transitions = dict(members)
        for keys in _places([key for key, _ in members]):
            yield _change(_place(keys, modules), what, [(key, transitions[key]) for key in keys])
        return
    keys = [key for key, _ in members]
    if len(keys) == 1:
        label = _name(keys[0].pattern, keys)
    elif not cls:
        label = f"all {len(keys)} modules"
    elif len({key.pattern for key in keys}) == 1:
        label = _name(keys[0].pattern, keys)
    else:
        label = f"{len(keys)} x {cls}{_where(keys, modules)}"
    yield _change(label, what, members)


def _change(label: str, what: str, members: list[tuple[_Key, _Transition]]) -> ManifestChange:
    moved = round(sum(new.bytes - old.bytes for _, (old, new) in members))
    size = f" ({format_change(moved, 'B')})" if moved else ""
    return ManifestChange(f"{label}: {what}{size}", len(members), moved)


def _places(keys: Sequence[_Key]) -> list[list[_Key]]:
    """Group modules of the same layers, and modules outside of layers."""
    indices: dict[str, set[int]] = defaultdict(set)
    for key in keys:
        if key.index is not None:
            indices[key.pattern].add(key.index)
    places: dict[tuple[str, str], list[_Key]] = defaultdict(list)
    for key in keys:
        layers = format_ranges(indices[key.pattern]) if key.index is not None else ""
        places[key.pattern.partition("*")[0] if layers else "", layers].append(key)
    return list(places.values())


def _place(keys: Sequence[_Key], modules: dict[_Key, _State]) -> str:
    patterns = sorted({key.pattern for key in keys})
    if len(patterns) == 1:
        return _name(patterns[0], keys)
    if keys[0].index is None:
        more = len(patterns) - _NAMES
        return ", ".join(patterns[:_NAMES]) + (f" and {more} more" if more > 0 else "")
    prefix = patterns[0].partition("*")[0]
    indices = {key.index for key in keys if key.index is not None}
    layers = f"{prefix}{format_ranges(indices)}"
    there = {key.pattern for key in modules if key.index in indices and key.pattern.startswith(prefix)}
    # Only a whole layer is called by the layer's name.
    return f"{layers}.*" if there == set(patterns) else f"{len(keys)} modules in {layers}"


def _name(pattern: str, keys: Iterable[_Key]) -> str:
    """Return a row's name with its numbers: ``model.layers.20-39.mlp.up_proj``."""
    return pattern.replace("*", format_ranges(key.index for key in keys if key.index is not None), 1)


def _where(keys: Sequence[_Key], modules: dict[_Key, _State]) -> str:
    """Return `` in model.layers.20-39`` if only some of the layers changed, else an empty text."""
    patterns = {key.pattern for key in keys}
    layers = {key.index for key in keys}
    everywhere = {key.index for key in modules if key.pattern in patterns}
    prefixes = {pattern.partition("*")[0] for pattern in patterns}
    if layers == everywhere or len(prefixes) > 1 or None in layers:
        return ""
    return f" in {prefixes.pop()}{format_ranges(index for index in layers if index is not None)}"
