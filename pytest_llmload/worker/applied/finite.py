"""The first forward gives finite logits."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_llmload.core.results import Problem
from pytest_llmload.worker.loaded import Loaded

CHECK = "finite"


def check(loaded: Loaded) -> Iterator[Problem]:
    if loaded.logits is None:
        return
    wrong = int((~loaded.logits.isfinite()).sum())
    if wrong:
        nans = int(loaded.logits.isnan().sum())
        yield Problem(
            CHECK, f"{wrong} of {loaded.logits.numel()} logits of the first forward are not finite ({nans} NaN)"
        )
