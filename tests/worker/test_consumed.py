"""Parameters that a matrix product consumes, by the operators of a forward."""

from __future__ import annotations

import torch

from pytest_llmload.worker.model.consumed import Consumed


def test_factors_of_a_product_are_consumed_and_what_is_added_or_scales_is_not() -> None:
    weight, bias, heads, scale, rows = (
        torch.ones(4, 8, 8),
        torch.ones(4, 8),
        torch.ones(4, 8),
        torch.ones(8, 8),
        torch.ones(8, 8),
    )
    states = torch.ones(2, 4, 8)
    with Consumed({"weight": weight, "bias": bias, "heads": heads, "scale": scale, "rows": rows}) as mode:
        torch.baddbmm(bias[:, None, :], (states * heads).transpose(0, 1), weight)
        # A weight that another scales is still the weight, in whichever dtype.
        torch.mm(torch.ones(2, 8, dtype=torch.bfloat16), (rows * 2).to(torch.bfloat16))
        torch.ones(8, 8) + scale
    assert mode.products == {"weight", "rows"}
    assert mode.touched == {"weight", "bias", "heads", "scale", "rows"}
