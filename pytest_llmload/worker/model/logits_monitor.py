"""Watch the logits of a generation, step by step."""

from __future__ import annotations

from typing import Any

import torch


class LogitsMonitor:
    """Looks at the logits of each step while the model generates, and keeps whether they are finite."""

    def __init__(self, model: Any) -> None:
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        # A class that generates with a decoder of its own may end a sequence with what separates two.
        ids = {*(ends if isinstance(ends, list) else [ends]), getattr(text, "sep_token_id", None)}
        #: Tokens whose logits are -inf because no sequence ends before its last token.
        self._ends = len(ids - {None})
        #: Of each step and row, whether a logit is not finite.
        self.wrong: list[list[bool]] = []

    def look(self, logits: Any) -> None:
        """Look at the logits of one step, batch x vocabulary, where they are, with nothing left there."""
        highest = torch.amax(logits, dim=-1)
        lowest = (logits == -torch.inf).sum(dim=-1)
        self.wrong.append((~highest.isfinite() | (lowest > self._ends)).tolist())
