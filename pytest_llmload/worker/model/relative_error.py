"""How far logits are off others."""

from __future__ import annotations

import math
from typing import Any


def relative_error(value: Any, reference: Any) -> float:
    """Return ``|value - reference| / |reference|`` over all logits; infinite for a different shape or for NaN."""
    if value.shape != reference.shape:
        return math.inf
    error = float((value.double() - reference.double()).norm() / reference.double().norm())
    return math.inf if math.isnan(error) else error
