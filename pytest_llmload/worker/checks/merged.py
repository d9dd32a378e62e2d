"""An adapter that was merged: its weights are ``W + scaling * B @ A``, and the model says what it said unmerged.

Merging rounds the sum to the dtype of the weights, and a quantised weight is quantised a second time. So "the same
output" has a definition of its own: each weight is the sum within the error of its type; and the logits are as far
from those with the adapter beside the weights as a merge that we make ourselves is, give or take a factor of two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import counted, plural
from pytest_llmload.quantisation import Stored
from pytest_llmload.worker.adapters.files import AdapterFiles
from pytest_llmload.worker.checkpoints.names import CheckpointNames
from pytest_llmload.worker.checkpoints.quantisation_config import read_format
from pytest_llmload.worker.checks.quantised_values import FileTensors, as_in_file
from pytest_llmload.worker.checks.values import difference_from
from pytest_llmload.worker.model.generation import first_forward
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.quantisable import CONV1D, LINEAR, Weight, quantisable
from pytest_llmload.worker.model.tensors import Held

CHECK = "merged"
EMBEDDING = "embedding"
#: Rows of a weight that are compared, first and last among them.
_ROWS = 16

#: How much further than our own merge's the logits may be from those with the adapter beside the weights.
_FACTOR = 2.0
#: Relative difference of logits below which sums in a different order are to blame.
_FLOOR = 1e-5


def check(loaded: Loaded) -> Iterator[Problem]:
    """Compare some rows of every merged weight with the checkpoint's and the adapter's files."""
    files = loaded.adapter
    if files is None or not loaded.job.spec.adapter_merged:
        return
    targets = _targets(loaded)
    missing = sorted(loaded.merged - set(targets))
    if missing:
        what = counted(len(missing), "weight that the adapter changes is", "weights that the adapter changes are")
        yield Problem(CHECK, f"{what} not in the model", tuple(missing))
    if not files.is_plain_lora:
        yield from _lost(loaded, targets)
        loaded.notes.append(
            "merged weights were seen to differ from the checkpoint's; by how much they should was not computed: the "
            "adapter is not a plain LoRA"
        )
        return
    names = loaded.checkpoint_names
    wrong: list[Weight] = []
    worst, unknown = 0.0, 0
    lost: list[str] = []
    is_in_file = _of_quantised_file(loaded)
    for path, weight in targets.items():
        if path in files.whole:
            same = torch.equal(files[files.whole[path]].to(weight.held.tensor.dtype), weight.held.tensor.detach().cpu())
            wrong += [] if same else [weight]
            continue
        name = _name_in_file(loaded, path, weight)
        if name is None:
            unknown += 1
            lost += [weight.module_path] if is_in_file(weight) else []
            continue
        error = _error(weight, _Sum(files, names, path, name, weight))
        if error > 1:
            wrong.append(weight)
            worst = max(worst, error)
    if unknown:
        what = counted(unknown, "merged weight was", "merged weights were")
        loaded.notes.append(
            f"{what} not compared: the checkpoint has a different form of {plural(unknown, 'it', 'them')}"
        )
    if lost:
        yield _not_merged(lost, len(targets))
    if wrong:
        yield Problem(
            CHECK,
            f"{len(wrong)} of {counted(len(targets), 'weight')} {plural(len(wrong), 'is', 'are')} not the checkpoint's "
            "with the adapter merged in" + (f": off by {worst:.1f} times what their type allows" if worst else ""),
            tuple(weight.name for weight in wrong),
            sum(weight.held.nbytes for weight in wrong),
        )


def is_merged(loaded: Loaded) -> bool:
    """Return whether the requested adapter is merged into a weight, by that weight's values."""
    files, inventory = loaded.adapter, loaded.inventory
    if files is None or not files.is_plain_lora:
        return False
    for weight in quantisable(loaded.model, inventory):
        name = _name_in_file(loaded, weight.name, weight)
        if weight.name.removesuffix(".weight") in files.targets and name is not None:
            return _error(weight, _Sum(files, loaded.checkpoint_names, weight.name, name, weight)) <= 1
    return False


def _lost(loaded: Loaded, targets: dict[str, Weight]) -> Iterator[Problem]:
    """Report modules all of whose weights are still the checkpoint's, although an adapter was to be merged in."""
    names = loaded.checkpoint_names
    same: dict[str, bool] = {}
    is_in_file = _of_quantised_file(loaded)
    for path, weight in targets.items():
        name = _name_in_file(loaded, path, weight)
        if weight.quantised is not None and names.files.are_quantised:
            same[weight.module_path] = same.get(weight.module_path, True) and is_in_file(weight)
        elif name is not None and weight.quantised is None and weight.held.tensor is not None:
            # A sample tells most; of an embedding an adapter may change single rows.
            equal = not difference_from(weight.held.tensor, names.files, name) and torch.equal(
                names.files.slice(name)[:].to(weight.held.tensor.dtype), weight.held.tensor.detach().cpu()
            )
            same[weight.module_path] = same.get(weight.module_path, True) and equal
    lost = [module for module, equal in same.items() if equal]
    if lost:
        yield _not_merged(lost, len(same))


def _not_merged(lost: list[str], count: int) -> Problem:
    return Problem(CHECK, f"the adapter is not merged into {len(lost)} of {counted(count, 'module')}", tuple(lost))


def _of_quantised_file(loaded: Loaded) -> Callable[[Weight], bool]:
    """Return a function that says whether a quantised weight is the one that the checkpoint holds in the same form."""
    in_file = read_format(loaded.job.checkpoint.path) if loaded.checkpoint_names.files.are_quantised else None
    files = FileTensors(loaded.checkpoint_names)

    def is_in_file(weight: Weight) -> bool:
        state = weight.quantised
        if in_file is None or state is None:
            return False
        return bool(as_in_file(weight, state, files.of(weight.module_path), in_file))

    return is_in_file


def output(loaded: Loaded) -> Iterator[Problem]:
    """Compare the logits with those of the same model with the adapter beside its weights, and of our own merge of it.

    No second model is in memory: each merged layer's output is replaced by what the checkpoint's weight and the adapter
    give, one layer at a time.
    """
    files = loaded.adapter
    if files is None or not loaded.job.spec.adapter_merged or not files.is_plain_lora:
        return
    targets = _targets(loaded)
    if any(path not in files.whole and _name_in_file(loaded, path, weight) is None for path, weight in targets.items()):
        # The sums would be of weights that the checkpoint holds quantised.
        return
    logits = first_forward(loaded).detach().float().cpu()
    with _instead(loaded, files, merged=False):
        beside = first_forward(loaded).detach().float().cpu()
    with _instead(loaded, files, merged=True):
        own = first_forward(loaded).detach().float().cpu()
    loaded.forget()
    size = float(beside.norm())
    moved, clean = float((logits - beside).norm()) / size, float((own - beside).norm()) / size
    kinds = "/".join(sorted({_kind(weight) for weight in targets.values()}))
    text = f"merging moved the logits by {moved:.2g} (relative); rounding the sums to {kinds} explains {clean:.2g}"
    if moved <= max(_FACTOR * clean, _FLOOR):
        loaded.notes.append(text)
    else:
        yield Problem(CHECK, text)


def _targets(loaded: Loaded) -> dict[str, Weight]:
    """Return the model's tensors that the merged adapter changed, by name."""
    inventory = loaded.inventory
    found = {weight.name: weight for weight in quantisable(loaded.model, inventory)}
    for held in inventory.parameters():
        name = inventory.base_path(held)
        if name in loaded.merged and name not in found:
            # Embeddings and heads, which no quantiser touches.
            module = inventory.modules[held.module]
            found[name] = Weight(held, name.rpartition(".")[0], module, _kind_of(module), None)
    return {name: found[name] for name in sorted(loaded.merged) if name in found}


def _kind(weight: Weight) -> str:
    return weight.quantised.scheme if weight.quantised is not None else weight.held.dtype


class _Sum:
    """What a merged weight should hold, row by row (an output's inputs, or an embedding's vector), in float32."""

    def __init__(self, files: AdapterFiles, names: CheckpointNames, path: str, name: str, weight: Weight) -> None:
        self._original = names.files.slice(name)
        self._weight = weight
        module = path.removesuffix(".weight")
        a, b = (factor.float() for factor in files.factors(module))
        b = b * files.scaling(module)
        # An embedding has a row for each of its inputs.
        self._left, self._right = (a.T, b.T) if weight.kind == EMBEDDING else (b, a)
        self.rows = int(self._left.shape[0])

    def original(self, row: int) -> Any:
        """Return the checkpoint's values; a Conv1D keeps its matrix as inputs x outputs."""
        part = self._original[:, row : row + 1] if self._weight.kind == CONV1D else self._original[row : row + 1]
        return part.float().reshape(-1)

    def delta(self, row: int) -> Any:
        """Return what the adapter adds."""
        return self._left[row] @ self._right

    def size(self, row: int) -> Any:
        """Return a bound of the summands' size, which rounding errors are relative to."""
        return self.original(row).abs() + self._left[row].abs() @ self._right.abs()

    def actual(self, row: int) -> Any:
        """Return the model's values."""
        state = self._weight.quantised
        if state is not None:
            columns = state.shape[-1]
            return state.dequantised(row * columns, (row + 1) * columns)
        tensor = self._weight.held.tensor.detach()
        return (tensor[:, row] if self._weight.kind == CONV1D else tensor[row]).cpu().float()


def _error(weight: Weight, total: _Sum) -> float:
    """Return how far a merged weight is off, relative to what its type allows."""
    rows = sorted({index * (total.rows - 1) // (_ROWS - 1) for index in range(_ROWS)})
    state = weight.quantised
    if state is not None:
        return max(_widest(state, total, rows), _share(total, rows))
    worst = 0.0
    for row in rows:
        # Rounded once as a sum, and once or twice as a product where the adapter itself is in 16 bit.
        allowed = 2 * torch.finfo(weight.held.tensor.dtype).eps * total.size(row) + 1e-9
        worst = max(worst, _largest((total.actual(row) - total.original(row) - total.delta(row)) / allowed))
    return worst


def _widest(state: Stored, total: _Sum, rows: list[int]) -> float:
    """Return the error of a weight that is quantised, merged, and quantised again.

    It is the error of the type twice, of the larger scale.
    """
    worst = 0.0
    for row in rows:
        original, wanted = total.original(row), total.original(row) + total.delta(row)
        scale = torch.maximum(original.abs(), wanted.abs()).max()
        allowed = 2 * (state.max_error or 0.0) * (1 + 2 * state.scale_error) * scale
        worst = max(worst, _largest((total.actual(row) - wanted) / allowed))
    return worst


def _share(total: _Sum, rows: list[int]) -> float:
    """Return how much of the adapter a quantised weight carries, by least squares: 1, or 0 where it was lost.

    The error of a 4-bit type is larger than what an adapter adds to a single element; over thousands it averages out.
    The distance from 1 relative to what is allowed: a quarter, and four standard errors.
    """
    added = torch.cat([total.delta(row) for row in rows])
    change = torch.cat([total.actual(row) - total.original(row) for row in rows])
    power = float(added @ added)
    if not power:
        return 0.0
    share = float(change @ added) / power
    deviation = float((change - share * added).norm()) / len(added) ** 0.5
    return float(abs(share - 1) / (0.25 + 4 * deviation / power**0.5))


def _largest(ratios: Any) -> float:
    worst = float(ratios.abs().max())
    return worst if worst == worst else 1e9


@contextmanager
def _instead(loaded: Loaded, files: AdapterFiles, *, merged: bool) -> Iterator[None]:
    """Let merged layers answer from the files: with the adapter beside their weights, or merged into them by us.

    A module that shares a merged weight without being a target of the adapter answers with the checkpoint's.
    """
    names, modules = loaded.checkpoint_names, loaded.inventory.modules
    targets = _targets(loaded)
    handles = []
    for path, weight in targets.items():
        name = _name_in_file(loaded, path, weight) if path not in files.whole else None
        if name is None:
            continue
        module = path.removesuffix(".weight")
        a, b = (factor.float() for factor in files.factors(module))
        hook = _answer(names, name, weight, (a, b * files.scaling(module)), merged)
        handles.append(weight.module.register_forward_hook(hook))
        for other, held in _sharing(loaded, weight).items():
            if other not in targets:
                alone = dataclasses.replace(weight, kind=_kind_of(modules[held.module]))
                handles.append(modules[held.module].register_forward_hook(_answer(names, name, alone, None, merged)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sharing(loaded: Loaded, weight: Weight) -> dict[str, Held]:
    """Return the model's other parameters in the memory of a weight, by name: an embedding that is tied to its head."""
    inventory = loaded.inventory
    return {
        inventory.base_path(held): held
        for held in inventory.parameters()
        if held.tensor is not None and held.storage == weight.held.storage and held.module != weight.held.module
    }


def _name_in_file(loaded: Loaded, path: str, weight: Weight) -> str | None:
    """Return the checkpoint's name of a weight, or of one that is tied to it.

    The result is None where the checkpoint holds it in a quantised form.
    """
    names = loaded.checkpoint_names
    found = (names.find(each) for each in (path, *_sharing(loaded, weight)))
    name = next((each for each in found if each is not None), None)
    dtype = names.files.slice(name).get_dtype() if name is not None else ""
    is_code = dtype.startswith("F8") and names.files.are_quantised
    return name if dtype.startswith(("F", "BF")) and not is_code else None


def _kind_of(module: Any) -> str:
    return EMBEDDING if isinstance(module, torch.nn.Embedding) else LINEAR


def _answer(
    names: CheckpointNames, name: str, weight: Weight, factors: tuple[Any, Any] | None, merged: bool
) -> Callable[..., Any]:
    linear, embedding = torch.nn.functional.linear, torch.nn.functional.embedding

    def hook(layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        values, dtype = inputs[0], output.dtype
        matrix = names.files.slice(name)[:].to(output.device)
        matrix = _as_stored(matrix.T if weight.kind == CONV1D else matrix, weight)
        bias = getattr(layer, "bias", None)

        def apply(matrix: Any) -> Any:
            if weight.kind == EMBEDDING:
                return embedding(values, matrix)
            return linear(values.to(dtype), matrix.to(dtype), None if bias is None else bias.to(dtype))

        if factors is None:
            return apply(matrix).to(dtype)
        right, left = (factor.to(output.device) for factor in factors)
        if merged:
            added = (left @ right).T if weight.kind == EMBEDDING else left @ right
            return apply(_as_stored((matrix.float() + added).to(matrix.dtype), weight)).to(dtype)
        lower = embedding(values, right.T) if weight.kind == EMBEDDING else linear(values.float(), right)
        return (apply(matrix).float() + linear(lower, left)).to(dtype)

    return hook


def _as_stored(matrix: Any, weight: Weight) -> Any:
    """Return a matrix as a load of the base alone would hold it: rounded to its type, and back."""
    state = weight.quantised
    if state is None:
        return matrix.to(getattr(torch, weight.held.dtype))
    rounded = state.rounded(matrix.contiguous().float().reshape(-1))
    return rounded.reshape(matrix.shape).to(matrix.dtype)
