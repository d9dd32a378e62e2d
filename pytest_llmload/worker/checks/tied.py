"""Weights that the config ties share their storage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import format_bytes
from pytest_llmload.worker.checkpoints.digests import read_config
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.tensors import Held

CHECK = "tied"
#: The config's field that ties the output head to the embedding.
TIES = "tie_word_embeddings"


def check(loaded: Loaded) -> Iterator[Problem]:
    """Check the library's own pairs where it tells them (transformers 5), else what the text part's config ties."""
    held = {loaded.inventory.base_path(item): item for item in loaded.inventory.parameters()}
    for target, source in pairs(loaded):
        first, second = held.get(source), held.get(target)
        if first is None or second is None or _shared(first, second) or _own_values(loaded, source, target):
            continue
        if {source, target} & trained_apart(loaded):
            continue
        if first.shape != second.shape:
            loaded.notes.append(f"{target} is split and {source} is not, so that they are not tied as the config says")
            continue
        yield Problem(
            CHECK,
            f"the config ties {target} to {source}, but each has its own storage ({format_bytes(second.nbytes)} twice)",
            (target, source),
            second.nbytes,
        )


def pairs(loaded: Loaded) -> list[tuple[str, str]]:
    """Return (target, source) of the weights that should share their storage."""
    return _declared(loaded) or (_ends(loaded) if getattr(loaded.text_config, TIES, False) else [])


def _declared(loaded: Loaded) -> list[tuple[str, str]]:
    """Return the pairs that the library tells; none if it is transformers 4, or its class ties nothing."""
    declared = getattr(loaded.model, "all_tied_weights_keys", None)
    return list(declared.items()) if isinstance(declared, dict) else []


def _ends(loaded: Loaded) -> list[tuple[str, str]]:
    """Return the weights of the output head and of the input embedding as a pair; none if the model lacks one."""
    inventory = loaded.inventory
    paths = {id(module): inventory.wrapping.base_module(path) for path, module in inventory.modules.items()}
    parts = [
        getattr(loaded.model, getter)() if hasattr(loaded.model, getter) else None
        for getter in ("get_output_embeddings", "get_input_embeddings")
    ]
    if any(part is None or id(part) not in paths for part in parts):
        return []
    target, source = (f"{paths[id(part)]}.weight" for part in parts)
    return [(target, source)]


def trained_apart(loaded: Loaded) -> set[str]:
    """Return the tied weights of which a merged adapter has a trained copy: after that PEFT does not tie them."""
    if loaded.adapter is None or not loaded.job.spec.adapter_merged:
        return set()
    # The merge has changed the live config, so that it does not tie any more.
    return {name for pair in _declared(loaded) or _ends(loaded) for name in pair} & loaded.adapter.whole.keys()


def says_untied(loaded: Loaded) -> bool:
    """Return whether the checkpoint's own config unties the weights; the load may have changed the live one."""
    config = read_config(Path(loaded.job.checkpoint.path))
    said = [part[TIES] for part in (config, config.get("text_config")) if part and TIES in part]
    return bool(said) and not any(said)


def _shared(first: Held, second: Held) -> bool:
    if first.source or second.source or "meta" in (first.device, second.device):
        # On disk, or on meta: no memory is spent twice.
        return first.device == second.device
    return first.storage == second.storage


def _own_values(loaded: Loaded, first: str, second: str) -> bool:
    """Return whether the checkpoint has both, with different values.

    Then the config is wrong, and not tying is right.
    """
    names = [loaded.checkpoint_names.find(name) for name in (first, second)]
    if None in names:
        return False
    blocks = [loaded.checkpoint_names.files.block(str(name), 0, 4096) for name in names]
    return not bool((blocks[0] == blocks[1]).all())
