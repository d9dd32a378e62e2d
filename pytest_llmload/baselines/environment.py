"""The surroundings of a load: what of them a baseline keeps, and how two of them differ."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_llmload.core.environment_entries import ENTRIES, UNKNOWN, VERSION
from pytest_llmload.core.portable import scrub


def stored(environment: Mapping[str, str]) -> dict[str, str]:
    """The entries of a load's environment that a baseline keeps: any other may hold a path, a user or a secret."""
    return {name: scrub(str(value)) for name, value in environment.items() if _is_stored(name) and value}


def _is_stored(name: str) -> bool:
    return name in ENTRIES and ENTRIES[name].stored


def entry(environment: Mapping[str, str], name: str) -> str:
    """One entry, or what its absence means; ``torch.minor`` is the first two numbers of ``torch``."""
    base, _, part = name.partition(".")
    value = environment.get(base) or ENTRIES[base].absent
    return ".".join(value.split("+")[0].split(".")[:2]) if part == "minor" else value


def differing(old: Mapping[str, str], new: Mapping[str, str], names: tuple[str, ...]) -> str:
    """``driver 550.54 -> 560.28`` for those of ``names`` that differ, joined by commas; empty where all are equal."""
    pairs = ((name.removesuffix(".minor"), entry(old, name), entry(new, name)) for name in names)
    return ", ".join(f"{name} {before} -> {after}" for name, before, after in pairs if before != after)


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[str, ...]:
    """Every stored entry that differs, library versions first; none of which the old side does not tell."""
    known = [name for name in ENTRIES if _is_stored(name) and entry(old, name) != UNKNOWN]
    names = sorted(known, key=lambda name: (ENTRIES[name].kind != VERSION, name))
    lines = (differing(old, new, (name,)) for name in names)
    return tuple(line for line in lines if line)
