"""Select the entries of a load's environment that a baseline keeps, and compare two environments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from pytest_llmload.core.environment_entries import ENTRIES, PACKAGES, UNKNOWN, VERSION, entry_of
from pytest_llmload.core.portable import scrubber

_MINOR = ".minor"
#: A version of a Python package; a commit's id, which may begin with a digit, has no dot.
_RELEASE = re.compile(r"v?\d+\.\w[\w.!+-]{0,63}")


def stored(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the entries that a baseline keeps; any other entry may hold a path, a user's name or a secret."""
    scrub = scrubber()
    return {name: scrub(str(value)) for name, value in environment.items() if value and _is_stored(name, value)}


def _is_stored(name: str, value: str) -> bool:
    return ENTRIES[name].stored if name in ENTRIES else _RELEASE.fullmatch(value) is not None


def entry(environment: Mapping[str, str], name: str) -> str:
    """Return an entry, or the value that its absence stands for; ``torch.minor`` is ``torch``'s first two numbers."""
    base = name.removesuffix(_MINOR)
    value = environment.get(base) or entry_of(base).absent
    return value if base == name else ".".join(value.split("+")[0].split(".")[:2])


def differing(old: Mapping[str, str], new: Mapping[str, str], names: tuple[str, ...]) -> str:
    """Return the differences among ``names``, as in ``driver 550.54 -> 560.28``, joined by commas; empty if equal.

    A package that only one of the sides names makes no difference: a file need not name every package.
    """
    pairs = ((name.removesuffix(_MINOR), entry(old, name), entry(new, name)) for name in _each(names, old, new))
    return ", ".join(
        f"{name} {before} -> {after}"
        for name, before, after in pairs
        if before != after and (name in ENTRIES or UNKNOWN not in (before, after))
    )


def concerning(key: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of ``names`` that are about the entry ``key``."""
    if key not in ENTRIES:
        return (key,) if PACKAGES in names else ()
    return tuple(name for name in names if name.removesuffix(_MINOR) == key)


def _each(names: Iterable[str], old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    """Yield the names, with the packages of the two sides in place of the name that stands for them."""
    for name in names:
        if name == PACKAGES:
            yield from sorted((old.keys() | new.keys()) - ENTRIES.keys())
        else:
            yield name


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[str, ...]:
    """Return every stored entry that differs, library versions first, without entries that the old side lacks."""
    kept = ENTRIES.keys() | stored(old).keys()
    known = [name for name in kept if entry_of(name).stored and entry(old, name) != UNKNOWN]
    names = sorted(known, key=lambda name: (entry_of(name).kind != VERSION, name))
    lines = (differing(old, new, (name,)) for name in names)
    return tuple(line for line in lines if line)
