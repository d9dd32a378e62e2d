"""A checkpoint that is quantised already (GPTQ, AWQ, FP8, MXFP4 …) is in the model as its config says it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import counted, plural
from pytest_llmload.quantisation import FileFormat
from pytest_llmload.quantisation.registry import method_in_file
from pytest_llmload.worker.checkpoints.quantisation_config import known_method
from pytest_llmload.worker.checks.problem_names import dense_weights, named, size_of, sized
from pytest_llmload.worker.checks.quantised_values import (
    FileTensors,
    holds_codes,
    stored_in_file,
    wrong_shapes,
    wrong_values,
)
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.quantisable import Weight, quantisable
from pytest_llmload.worker.model.tensors import Held, is_packed

CHECK = "quantised"


def check(loaded: Loaded, found: FileFormat) -> Iterator[Problem]:
    """Yield that nothing is quantised, or what is dense although the files hold it quantised, or has other values."""
    weights = list(quantisable(loaded.model, loaded.inventory))
    quantised = [weight for weight in weights if weight.quantised is not None]
    dense = [weight for weight in weights if _is_dense(weight)]
    packed = packed_modules(loaded)
    if not packed:
        lost = _packed_in_file(loaded, dense, found) or dense
        what = dense_weights(lost)
        yield Problem(CHECK, f"{_nothing(found)}: {what}", named(lost), size_of(lost))
        return
    yield from wrong_shapes(quantised)
    yield from wrong_values(loaded, quantised)
    names = loaded.checkpoint_names
    lost = [
        weight for weight in dense if (name := names.find(weight.name)) is None or holds_codes(names.files.slice(name))
    ]
    if lost:
        yield Problem(
            CHECK,
            f"the checkpoint is {found.description}, but {sized(lost, 'weight')} that its files hold quantised "
            f"{plural(len(lost), 'is', 'are')} dense in the model",
            named(lost),
            size_of(lost),
        )
    loaded.notes.append(
        f"the checkpoint is {found.description}: {counted(packed, 'module holds', 'modules hold')} quantised weights, "
        f"{dense_weights(dense)}"
    )
    if method_in_file(found.method) is None:
        loaded.notes.append(
            f"{found.method} is not a method that pytest-llmload knows: its weights are counted and named, but neither "
            "their type nor their values were checked"
        )


def packed_modules(loaded: Loaded) -> int:
    """Return how many modules hold a weight in a quantised form."""
    owned: dict[str, list[Held]] = defaultdict(list)
    for held in loaded.inventory.held:
        owned[held.module].append(held)
    return sum(is_packed(tensors) for tensors in owned.values())


def _packed_in_file(loaded: Loaded, weights: list[Weight], found: FileFormat) -> list[Weight]:
    """Return the weights that the files hold quantised, by the method that knows their form."""
    files = FileTensors(loaded.checkpoint_names)
    tensors = ((weight, files.of(weight.module_path)) for weight in weights)
    return [weight for weight, own in tensors if stored_in_file(own, weight.name.rpartition(".")[2], found) is not None]


def _nothing(found: FileFormat) -> str:
    import transformers

    if not known_method(found):
        return (
            f"the checkpoint's config.json says {found.method!r}, which transformers {transformers.__version__} does "
            "not know: it skipped the quantisation"
        )
    return f"the checkpoint's config.json says {found.description}, but nothing is quantised in the model"


def _is_dense(weight: Weight) -> bool:
    return weight.quantised is None and weight.held.dtype in ("float32", "float16", "bfloat16")
