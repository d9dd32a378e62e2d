"""Every parameter comes from the checkpoint, and every tensor of the checkpoint is somewhere in the model.

The library's own account (:mod:`keys`) ends when its loading call returns, and a user's own loader gives none: what
either did to the model afterwards shows in the names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import counted, plural
from pytest_llmload.worker.checkpoints.names import CheckpointNames
from pytest_llmload.worker.checkpoints.quantisation_config import read_format
from pytest_llmload.worker.checks.keys import CHECK, HINTED, hint, is_allowed, patterns
from pytest_llmload.worker.checks.problem_names import named, size_of
from pytest_llmload.worker.checks.tied import pairs
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.tensors import BUFFER, PARAMETER, Held

#: torch's parametrizations keep a tensor ``weight`` as ``parametrizations.weight.original``.
_PARAMETRIZED = re.compile(r"parametrizations\.([^.]+)\.original\d*$")
#: Buffers that checkpoints of older releases have in other places than the model (transformers,
#: ``_adjust_missing_and_unexpected_keys``).
_MOVED_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


def check(loaded: Loaded) -> Iterator[Problem]:
    """Report parameters that no file has, and tensors of the files that no module holds.

    Parameters are reported only where the library gives no account. What is left over on both sides may be the same
    under two names, and is noted only; but not where the other side has its like in another layer, for there its name
    is known.
    """
    names = loaded.checkpoint_names
    if names.files.unread:
        # ``values`` says so.
        return
    told = frozenset((loaded.loading_info or {}).get("missing_keys", ()))
    homeless, unclaimed, claimed = _left_over(loaded, names)
    homeless = [held for held in homeless if not told.intersection(_paths(loaded, held))]
    unclaimed = list(_unexplained(loaded, names, unclaimed))
    in_file, in_model = set(map(_like, names.files.where)), set(map(_like, claimed))
    missing, strange = _parted(homeless, lambda held: bool(in_file.intersection(map(_like, _paths(loaded, held)))))
    unused, unknown = _parted(unclaimed, lambda name: _like(name) in in_model)
    if strange and (unknown or names.divided):
        loaded.notes.append(
            f"{counted(len(strange), 'parameter')} ({strange[0].path}{' …' if len(strange) > 1 else ''}) "
            f"{plural(len(strange), 'was', 'were')} not found in the checkpoint, of which "
            f"{counted(len(unknown), 'tensor was', 'tensors were')} not found in the model: there they may have "
            "other names"
        )
    else:
        missing += strange
        unused += unknown
    if missing and loaded.loading_info is None:
        yield Problem(
            CHECK,
            f"{counted(len(missing), 'parameter of the model is', 'parameters of the model are')} not in the "
            f"checkpoint, so nothing says what {plural(len(missing), 'it', 'they')} should hold",
            named(missing),
            size_of(missing),
        )
    if unused:
        found = patterns(unused, claimed)
        yield Problem(
            CHECK,
            f"{counted(len(unused), 'tensor is', 'tensors are')} in the checkpoint, but not in the model: "
            f"{plural(len(unused), 'its place is', 'their places are')} gone or changed",
            tuple(sorted(unused)),
            hint=hint(loaded, found) if len(found) <= HINTED else "",
        )


def _left_over(loaded: Loaded, names: CheckpointNames) -> tuple[list[Held], list[str], set[str]]:
    """Return parameters that are in no file, tensors of the files that are not in the model, and those that are.

    A module that has both holds its weights in a different form: quantised, or packed.
    """
    inventory = loaded.inventory
    own = [held for held in inventory.held if held.role in (PARAMETER, BUFFER) and not inventory.is_adapter(held)]
    sources = [(held, {name for path in _paths(loaded, held) for name in names.sources(path)}) for held in own]
    claimed = names.divided.union(*(found for _, found in sources))
    found_paths = {path for held, found in sources if found for path in _paths(loaded, held)}
    for pair in pairs(loaded):
        if found_paths.intersection(pair):
            found_paths.update(pair)
    found_places = {held.storage for held, found in sources if found and _in_memory(held)}
    homeless = [
        held
        for held, found in sources
        if not found
        and not found_paths.intersection(_paths(loaded, held))
        and not (_in_memory(held) and held.storage in found_places)
    ]
    unclaimed = [name for name in names.files.where if name not in claimed]
    of_homeless = [(held, _modules(loaded, names, held)) for held in homeless]
    of_unclaimed = [(name, _bare(names, names.target(name).rpartition(".")[0])) for name in unclaimed]
    changed = {module for _, modules in of_homeless for module in modules} & {module for _, module in of_unclaimed}
    excused = _declared(loaded, "_keys_to_ignore_on_load_missing")
    saved = tuple(f"{path}." for path in inventory.wrapping.saved)
    parameters = [
        held
        for held, modules in of_homeless
        if held.role == PARAMETER
        and not changed & modules
        # An adapter has a trained copy in its place, or the class says that files lack it.
        and not held.path.startswith(saved)
        and not any(re.search(pattern, path) for pattern in excused for path in _paths(loaded, held))
    ]
    return parameters, [name for name, module in of_unclaimed if module not in changed], claimed


def _paths(loaded: Loaded, held: Held) -> tuple[str, ...]:
    """Return a tensor's names in the whole model, without what adapters put around it.

    That of a parametrization is looked through, unless the checkpoint has it too: a class with a weight norm saves it.
    """
    piece = loaded.shards.pieces.get(held.path) if loaded.shards is not None else None
    paths = (piece.name,) if piece is not None else loaded.inventory.base_paths(held)
    in_file = loaded.checkpoint_names.find
    return tuple(path if in_file(path) is not None else _PARAMETRIZED.sub(r"\1", path) for path in paths)


def _modules(loaded: Loaded, names: CheckpointNames, held: Held) -> set[str]:
    """Return the modules that own a tensor; a wrapped tensor's parts have names with dots (``weight.qdata``)."""
    paths = _paths(loaded, held)
    return {
        _bare(names, path.removesuffix(f".{held.name}").removesuffix(f".{path.rpartition('.')[2]}")) for path in paths
    }


def _bare(names: CheckpointNames, path: str) -> str:
    """Return a path without the base model's prefix, which files may have or lack."""
    return path.removeprefix(f"{names.prefix}.") if names.prefix else path


def _in_memory(held: Held) -> bool:
    return held.tensor is not None and held.device != "meta" and held.nbytes > 0


def _unexplained(loaded: Loaded, names: CheckpointNames, unclaimed: list[str]) -> Iterator[str]:
    """Yield the names without those that are not a weight of the model, are allowed, or the library reported."""
    told = frozenset((loaded.loading_info or {}).get("unexpected_keys", ()))
    buffers = [held.path for held in loaded.inventory.held if held.role == BUFFER]
    moved = {pattern for pattern in _MOVED_BUFFERS if any(re.search(pattern, path) for path in buffers)}
    ignored = _declared(loaded, "_keys_to_ignore_on_load_unexpected") | moved
    modules: set[str] = set()
    if read_format(loaded.job.checkpoint.path) is not None:
        # Beside its weights a quantised checkpoint has what the quantiser needs to read them.
        owners = map(loaded.inventory.wrapping.base_module, loaded.inventory.modules)
        modules = {_bare(names, owner) for owner in owners if owner}
    for name in unclaimed:
        both = {name, names.target(name)}
        if not (
            both & told
            or is_allowed(loaded, both)
            or any(re.search(pattern, key) for pattern in ignored for key in both)
            or _owners(_bare(names, names.target(name))) & modules
        ):
            yield name


def _owners(name: str) -> set[str]:
    """Return the modules that a tensor may belong to.

    What a quantiser stores beside a weight has the weight's module in its name, at any depth:
    ``q_proj.weight.quant_state.bitsandbytes__nf4``, ``experts.down_proj.absmax``.
    """
    module, weight, _ = name.partition(".weight.")
    if weight:
        return {module}
    module = name.rpartition(".")[0]
    return {module, module.rpartition(".")[0]}


def _declared(loaded: Loaded, attribute: str) -> set[str]:
    """Return the patterns that the classes of the model and its parts declare."""
    found: Iterable[Any] = (getattr(module, attribute, None) for module in loaded.inventory.modules.values())
    return {str(pattern) for patterns in found for pattern in patterns or ()}


def _parted(items: Iterable[Any], test: Callable[[Any], bool]) -> tuple[list[Any], list[Any]]:
    """Return the items that pass the test, and the others."""
    found: tuple[list[Any], list[Any]] = ([], [])
    for item in items:
        found[not test(item)].append(item)
    return found


def _like(name: str) -> str:
    """Return a name that is the same for all layers: with a star for each number."""
    return re.sub(r"\d+", "*", name)
