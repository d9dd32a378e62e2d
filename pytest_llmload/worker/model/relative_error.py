"""How far logits are off others."""

from __future__ import annotations

import math
from typing import Any

import torch


def relative_error(value: Any, reference: Any) -> float:
    """Return ``|value - reference| / |reference|`` over all logits; infinite for a different shape or for NaN.

    Equal logits, which most of those that are compared are, cost no arithmetic in 64 bit.
    """
    if value.shape != reference.shape:
        return math.inf
    if torch.equal(value, reference):
        return 0.0
    error = float((value.double() - reference.double()).norm() / reference.double().norm())
    return math.inf if math.isnan(error) else error
