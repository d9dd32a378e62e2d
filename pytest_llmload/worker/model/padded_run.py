"""The result of a generation on a padded batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Rows; the last one has half of its prompt padded.
ROWS = 2


@dataclass
class PaddedRun:
    """The logits, the cache and the layers' outputs of a generation on a padded batch."""

    #: Logits of each step, rows x vocabulary, fp32 on the host.
    logits: list[Any] = field(default_factory=list)
    #: What the model kept between the steps; None where it keeps nothing.
    cache: Any = None
    #: Tokens that the cache was filled with.
    tokens: int = 0
    rows: int = ROWS
    #: Each layer's output at the last position of the first row: L2 norm, and its product with fixed signs.
    layers: dict[str, list[float]] = field(default_factory=dict)
    #: True if the model generated: only a generation keeps a cache.
    generated: bool = False
