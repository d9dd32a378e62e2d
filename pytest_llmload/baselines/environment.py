"""Select the entries of a load's environment that a baseline keeps, and compare two environments."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_llmload.core.environment_entries import ENTRIES, UNKNOWN, VERSION
from pytest_llmload.core.portable import scrub

_MINOR = ".minor"


def stored(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the entries that a baseline keeps; any other entry may hold a path, a user's name or a secret."""
    return {name: scrub(str(value)) for name, value in environment.items() if _is_stored(name) and value}


def _is_stored(name: str) -> bool:
    return name in ENTRIES and ENTRIES[name].stored


def entry(environment: Mapping[str, str], name: str) -> str:
    """Return an entry, or the value that its absence stands for; ``torch.minor`` is ``torch``'s first two numbers."""
    base = name.removesuffix(_MINOR)
    value = environment.get(base) or ENTRIES[base].absent
    return value if base == name else ".".join(value.split("+")[0].split(".")[:2])


def differing(old: Mapping[str, str], new: Mapping[str, str], names: tuple[str, ...]) -> str:
    """Return the differences among ``names``, as in ``driver 550.54 -> 560.28``, joined by commas; empty if equal."""
    pairs = ((name.removesuffix(_MINOR), entry(old, name), entry(new, name)) for name in names)
    return ", ".join(f"{name} {before} -> {after}" for name, before, after in pairs if before != after)


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[str, ...]:
    """Return every stored entry that differs, library versions first, without entries that the old side lacks."""
    known = [name for name in ENTRIES if _is_stored(name) and entry(old, name) != UNKNOWN]
    names = sorted(known, key=lambda name: (ENTRIES[name].kind != VERSION, name))
    lines = (differing(old, new, (name,)) for name in names)
    return tuple(line for line in lines if line)
