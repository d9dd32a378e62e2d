"""Compare the ``numbers`` of two loads: one model's outputs on fixed tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pytest_llmload.baselines.model import rounding
from pytest_llmload.core.dtypes import TORCH_NAMES
from pytest_llmload.core.environment_entries import QUANTISERS
from pytest_llmload.core.results import ManifestRow, Numbers
from pytest_llmload.core.units import counted

#: Relative error up to which two models count as the same, by the coarsest floating type that computes. Repeats on one
#: machine are equal to the bit, with any number of threads. The same sums in a different order (different kernels, sdpa
#: instead of eager attention) changed the logits of a 16-layer model with outlier channels by 1.5e-6 in fp32, 3.3e-3 in
#: fp16 and 2.7e-2 in bf16; one re-initialised norm changes them by 0.1 and more, a wrong rotation by 0.8.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
#: For any other type (8-bit floats, quantised activations).
COARSEST = 5e-2
#: Buffers are computed, not learnt: only the order of their sums may differ.
BUFFER_TOLERANCE = 1e-4

#: Environment entries that must be equal for numbers to be compared, in addition to the device and the weights.
DEPENDS = ("torch.minor",)
#: Entries that must also be equal for the stored bytes to be compared.
BYTES_DEPEND = ("torch", "transformers", *QUANTISERS, "peft", "cpu_isa")

_STORAGE = {"int8", "uint8", "int32", "int64", "bool", ""}


@dataclass(frozen=True)
class Difference:
    """The difference between two loads' numbers."""

    #: Relative error of the logits, or of the part that changed more in proportion.
    error: float
    #: One sentence, the buffers first; empty if nothing changed by more than the tolerance.
    reason: str
    #: Why the numbers cannot be compared; empty if they can.
    incomparable: str = ""


def tolerance(manifest: Iterable[ManifestRow]) -> float:
    """Return the relative error that is allowed for a model with these modules."""
    types = set()
    for row in manifest:
        types |= {TORCH_NAMES.get(name, name) for name in row.dtype.split("+")}
        types |= {TORCH_NAMES.get(item[8:], item[8:]) for item in row.quant.split() if item.startswith("compute=")}
        # 8-bit schemes round the activations too, so a difference in the last bit becomes a whole step.
        types |= {"quantised"} if row.quant else set()
    return max((TOLERANCES.get(name, COARSEST) for name in types - _STORAGE), default=COARSEST)


def difference(old: Numbers, new: Numbers, allowed: float) -> Difference:
    """Return how ``new`` differs from ``old``; relative errors up to ``allowed`` do not count as a difference."""
    for name in ("logits", "logsumexp", "margin"):
        before, after = len(getattr(old, name)), len(getattr(new, name))
        if before != after:
            return Difference(
                0.0, "", f"the baseline has {counted(before, 'value')} of {name}, but this load has {after}"
            )
    if not all(map(math.isfinite, (*new.logits, *new.logsumexp, *new.margin))):
        return Difference(math.inf, "the logits are not finite")
    moved = [
        name for name in sorted(old.buffers) if name in new.buffers and _moved(old.buffers[name], new.buffers[name])
    ]
    scale = _rms(old.logits) or _rms(old.logsumexp) or 1.0
    # All three errors are relative to a logit; a margin is the difference of two logits.
    errors = {
        "logits": _error(old.logits, new.logits) / scale,
        **_padded(old, new),
        "log-sum-exp": _error(old.logsumexp, new.logsumexp) / scale,
        "margin": _error(old.margin, new.margin) / scale / 2,
    }
    name, error = max(errors.items(), key=lambda item: item[1])
    parts = [f"{buffer} values changed" for buffer in moved]
    if error > allowed:
        where = _first_layer(old.layers, new.layers, allowed)
        parts.append(f"relative {name} error {error:.2g} (tolerance {allowed:g}){where}")
    return Difference(error, ", ".join(parts))


def _padded(old: Numbers, new: Numbers) -> dict[str, float]:
    """Return the relative error of the logits after padding, if both sides have equally many."""
    if not old.padded or len(old.padded) != len(new.padded):
        return {}
    if not all(map(math.isfinite, new.padded)):
        return {"padded logits": math.inf}
    return {"padded logits": _error(old.padded, new.padded) / (_rms(old.padded) or 1.0)}


def _first_layer(old: Mapping[str, Sequence[float]], new: Mapping[str, Sequence[float]], allowed: float) -> str:
    """Return the first layer, in the order of the forward pass, whose output differs."""
    for name in sorted(old.keys() & new.keys(), key=natural):
        (norm, product), (other_norm, other_product) = old[name], new[name]
        off = max(abs(other_norm - norm), abs(other_product - product)) / (norm or 1.0)
        if not off <= allowed:
            return f"; {name} is the first layer whose output differs"
    return "; no layer's output differs by as much" if old and new else ""


def natural(path: str) -> list[tuple[int, str]]:
    """Return a sort key that orders the numbers in a path by value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def other_contents(old: Numbers, new: Numbers) -> str:
    """Return which stored weights hold different bytes; empty if none does, or if one side lacks checksums."""
    both = old.checksums.keys() & new.checksums.keys()
    names = sorted(name for name in both if old.checksums[name] != new.checksums[name])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}: bytes differ from the baseline" if names else ""


def _moved(old: Sequence[float], new: Sequence[float]) -> bool:
    """Return whether a buffer's sum or norm changed; a sum near zero is judged by the norm."""
    scale = max(map(abs, old), default=0.0) or 1.0
    return len(old) != len(new) or any(
        not abs(after - before) <= BUFFER_TOLERANCE * scale for before, after in zip(old, new, strict=False)
    )


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values)) if values else 0.0


def _error(old: Sequence[float], new: Sequence[float]) -> float:
    """Return the root mean square of the differences, minus the error that the file's rounding may cause."""
    unit = rounding(old)
    return _rms([max(abs(after - before) - unit, 0.0) for before, after in zip(old, new, strict=True)])
