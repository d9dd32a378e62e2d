"""The surroundings of a load: what of them a baseline keeps, and how two of them differ."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_llmload.core.metrics import METRICS
from pytest_llmload.core.portable import scrub

#: Entries that belong to each time, not to the file: times of several hosts stand in one file.
HOST = "host"
PAGE_CACHE = "page_cache"

_VERSIONS = (
    "accelerate",
    "bitsandbytes",
    "cuda",
    "deepspeed",
    "flash_attn",
    "kernels",
    "numpy",
    "peft",
    "python",
    "rocm",
    "safetensors",
    "server",
    "tensor_parallel",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
)
_MACHINE = ("cpu", "cpu_isa", "driver", "gpu", "libc")
_SETTINGS = ("allocator", "attn", "malloc", "revision", "threads")

#: The only entries that are ever written: everything else may hold a path, a user or a secret.
ALLOWED = frozenset((*_VERSIONS, *_MACHINE, *_SETTINGS, *(name for m in METRICS.values() for name in m.depends))) - {
    HOST,
    PAGE_CACHE,
}

_UNKNOWN = "unknown"


def stored(environment: Mapping[str, str]) -> dict[str, str]:
    """The entries of a load's environment that a baseline keeps."""
    return {name: scrub(str(value)) for name, value in environment.items() if name in ALLOWED and value}


def entry(environment: Mapping[str, str], name: str) -> str:
    """One entry, or ``unknown``; ``torch.minor`` is the first two numbers of ``torch``."""
    base, _, part = name.partition(".")
    value = environment.get(base) or _UNKNOWN
    return ".".join(value.split("+")[0].split(".")[:2]) if part == "minor" else value


def differing(old: Mapping[str, str], new: Mapping[str, str], names: tuple[str, ...]) -> str:
    """``driver 550.54 -> 560.28`` for those of ``names`` that differ, joined by commas; empty where all are equal."""
    pairs = ((name.removesuffix(".minor"), entry(old, name), entry(new, name)) for name in names)
    return ", ".join(f"{name} {before} -> {after}" for name, before, after in pairs if before != after)


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[str, ...]:
    """Every entry that differs, library versions first."""
    names = sorted(ALLOWED & (set(old) | set(new)), key=lambda name: (name not in _VERSIONS, name))
    lines = (differing(old, new, (name,)) for name in names)
    return tuple(line for line in lines if line)
