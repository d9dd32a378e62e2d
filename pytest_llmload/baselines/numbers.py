"""Whether two fingerprints (``numbers``) of one model on fixed tokens say the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pytest_llmload.baselines.model import rounding
from pytest_llmload.core.dtypes import TORCH_NAMES
from pytest_llmload.core.results import ManifestRow, Numbers

#: Relative error that is still the same model, by the coarsest floating type that computes. Repeats on one machine
#: are equal to the bit, whatever the number of threads. The same sums in another order (other kernels, sdpa against
#: eager attention) moved the logits of a 16-layer model with outlier channels by 1.5e-6 in fp32, 3.3e-3 in fp16 and
#: 2.7e-2 in bf16; one re-initialised norm moves them by 0.1 and more, a wrong rotation by 0.8.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
#: Where the type is another one (8-bit floats, quantised activations).
COARSEST = 5e-2
#: Buffers are computed, not learnt: sums in another order are all that may differ.
BUFFER_TOLERANCE = 1e-4

#: Environment entries that must be equal for fingerprints to be compared, beside the device and the weights.
DEPENDS = ("torch.minor",)
#: Entries that must be equal too for the stored bytes to be compared.
BYTES_DEPEND = ("torch", "transformers", "bitsandbytes", "peft", "cpu_isa")

_STORAGE = {"int8", "uint8", "int32", "int64", "bool", ""}


@dataclass(frozen=True)
class Difference:
    """How far two fingerprints are apart."""

    #: Relative error of the logits, or of what moved more in proportion.
    error: float
    #: One sentence, the buffers first; empty where nothing moved by more than the tolerance.
    reason: str
    #: Why they cannot be compared; empty where they can.
    incomparable: str = ""


def tolerance(manifest: Iterable[ManifestRow]) -> float:
    """The relative error allowed for a model with these modules."""
    types = set()
    for row in manifest:
        types |= {TORCH_NAMES.get(name, name) for name in row.dtype.split("+")}
        types |= {TORCH_NAMES.get(item[8:], item[8:]) for item in row.quant.split() if item.startswith("compute=")}
        # 8-bit schemes round the activations too: a last bit there is a whole step.
        types |= {"quantised"} if row.quant else set()
    return max((TOLERANCES.get(name, COARSEST) for name in types - _STORAGE), default=COARSEST)


def difference(old: Numbers, new: Numbers, allowed: float) -> Difference:
    """How ``new`` differs from ``old``, where a relative error of ``allowed`` is none."""
    for name in ("logits", "logsumexp", "margin"):
        before, after = len(getattr(old, name)), len(getattr(new, name))
        if before != after:
            return Difference(0.0, "", f"the baseline has {before} values of {name} and this load has {after}")
    if not all(map(math.isfinite, (*new.logits, *new.logsumexp, *new.margin))):
        return Difference(math.inf, "the logits are not finite")
    moved = [
        name for name in sorted(old.buffers) if name in new.buffers and _moved(old.buffers[name], new.buffers[name])
    ]
    scale = _rms(old.logits) or _rms(old.logsumexp) or 1.0
    # All three as parts of a logit; a margin is the difference of two.
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
    """Return the relative error of the logits after padding, where both sides have as many."""
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
    """Sort the numbers in a path as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def other_contents(old: Numbers, new: Numbers) -> str:
    """Return which stored weights hold other bytes; empty where none does, or one side has no checksums."""
    both = old.checksums.keys() & new.checksums.keys()
    names = sorted(name for name in both if old.checksums[name] != new.checksums[name])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}: other bytes than in the baseline" if names else ""


def _moved(old: Sequence[float], new: Sequence[float]) -> bool:
    """Whether a buffer's sum or norm moved; a sum near zero is judged by the norm."""
    scale = max(map(abs, old), default=0.0) or 1.0
    return len(old) != len(new) or any(
        not abs(after - before) <= BUFFER_TOLERANCE * scale for before, after in zip(old, new, strict=False)
    )


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values)) if values else 0.0


def _error(old: Sequence[float], new: Sequence[float]) -> float:
    """Root mean square of the differences, without what the digits of the file are to blame for."""
    unit = rounding(old)
    return _rms([max(abs(after - before) - unit, 0.0) for before, after in zip(old, new, strict=True)])
