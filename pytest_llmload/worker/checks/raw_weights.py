"""Parameters outside any Linear that a matrix product consumes are weights too, and no quantiser sees them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import Any

import torch

from pytest_llmload.core.results import Problem
from pytest_llmload.core.spec import AS_STORED
from pytest_llmload.core.units import plural
from pytest_llmload.worker.checks.problem_names import named, size_of, sized
from pytest_llmload.worker.checks.quantised import CHECK
from pytest_llmload.worker.model.consumed import Consumed
from pytest_llmload.worker.model.generation import first_forward
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.quantisable import exempt, quantisable
from pytest_llmload.worker.model.tensors import Held

#: Elements of a row below which a matrix that no forward reads is not worth a note.
_WORTH = 64


def check(loaded: Loaded) -> Iterator[Problem]:
    """Run the model once more and look at what its matrix products consume; called after every figure was taken."""
    spec = loaded.job.spec
    if spec.quant == AS_STORED:
        return
    candidates = _candidates(loaded)
    if not candidates:
        return
    mode = Consumed({path: _parameter(loaded, held) for path, held in candidates.items()})
    with mode:
        first_forward(loaded)
    skipped = (*spec.dense_ok, *(f"*{name}*" for name in spec.skip_modules))
    found: list[Held] = []
    allowed: list[Held] = []
    unread: list[Held] = []
    for path, held in candidates.items():
        if path in mode.products:
            patterns = (held.module, path, loaded.inventory.base_path(held))
            is_allowed = any(fnmatch.fnmatchcase(name, pattern) for name in patterns for pattern in skipped)
            (allowed if is_allowed else found).append(held)
        elif path not in mode.touched and min(held.shape) >= _WORTH:
            unread.append(held)
    if found:
        yield Problem(
            CHECK,
            f"{sized(found, 'dense weight')} {plural(len(found), 'is', 'are')} "
            f"consumed by matrix products outside any nn.Linear: {spec.quant} does not see "
            f"{plural(len(found), 'it', 'them')}",
            named(found),
            size_of(found),
            _hint(spec.quant, found),
        )
    for text, helds in (
        ("dense as dense_ok or skip_modules says", allowed),
        ("dense, and not used to read text", unread),
    ):
        if helds:
            names = ", ".join(held.path for held in helds[:3])
            loaded.notes.append(f"{sized(helds, 'weight')} {plural(len(helds), 'is', 'are')} {text}: {names}")


def _candidates(loaded: Loaded) -> dict[str, Held]:
    """Return dense matrices that the other check did not judge, and that are neither embedding, head nor router."""
    weights = [weight.held for weight in quantisable(loaded.model, loaded.inventory)]
    judged = {held.path for held in weights}
    # A weight that several Linears share is judged at the first of them.
    left_out = exempt(loaded.model, loaded.inventory) | {id(_parameter(loaded, held)) for held in weights}
    return {
        held.path: held
        for held in loaded.inventory.parameters()
        if len(held.shape) >= 2
        and held.dtype in ("float32", "float16", "bfloat16")
        and held.path not in judged
        # Scales of a quantised weight are part of it.
        and loaded.inventory.stored(held) is None
        and held.tensor is not None
        and held.device != "meta"
        and not isinstance(loaded.inventory.modules[held.module], (torch.nn.Embedding, torch.nn.modules.conv._ConvNd))
        and id(_parameter(loaded, held)) not in left_out
    }


def _parameter(loaded: Loaded, held: Held) -> Any:
    return loaded.inventory.modules[held.module]._parameters.get(held.name, held.tensor)


def _hint(scheme: str, found: list[Held]) -> str:
    ends = sorted({f"*.{held.path.rsplit('.', 2)[-2]}.{held.name}" for held in found if "." in held.path})
    return f"if that is intended: quant({scheme!r}, dense_ok={ends})" if 0 < len(ends) <= 3 else ""
