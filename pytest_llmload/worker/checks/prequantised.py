"""A checkpoint that others quantised (GPTQ, AWQ, FP8, MXFP4 …) is in the model as its config says it is.

What such weights stand for is not computed here; whether they are still quantised shows in the model's own tensors, and
in what the files hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import format_bytes
from pytest_llmload.worker.checkpoints.names import CheckpointNames
from pytest_llmload.worker.checkpoints.quantisation_config import FileFormat, known_method
from pytest_llmload.worker.checks.problem_names import named, size_of
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.quantisable import Weight, quantisable
from pytest_llmload.worker.model.tensors import Held, is_packed

CHECK = "quantised"


def check(loaded: Loaded, found: FileFormat) -> Iterator[Problem]:
    """Something is quantised, and nothing is dense that the files hold quantised."""
    owned: dict[str, list[Held]] = defaultdict(list)
    for held in loaded.inventory.held:
        owned[held.module].append(held)
    packed = [tensors for tensors in owned.values() if is_packed(tensors)]
    dense = [weight for weight in quantisable(loaded.model, loaded.inventory) if _is_dense(weight)]
    what = f"{len(dense)} weights ({format_bytes(size_of(dense))}) are dense"
    if not packed:
        yield Problem(CHECK, f"{_nothing(found)}: {what}", named(dense), size_of(dense))
        return
    names = loaded.checkpoint_names
    lost = [weight for weight in dense if (name := names.find(weight.name)) is None or _is_narrow(names, name)]
    if lost:
        yield Problem(
            CHECK,
            f"the checkpoint is {found.description}, but {len(lost)} weights ({format_bytes(size_of(lost))}) that its "
            "files hold quantised are dense in the model",
            named(lost),
            size_of(lost),
        )
    loaded.notes.append(f"the checkpoint is {found.description}: {len(packed)} modules hold quantised weights, {what}")


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


def _is_narrow(names: CheckpointNames, name: str) -> bool:
    return names.files.slice(name).get_dtype() not in ("F32", "F16", "BF16", "F64")
