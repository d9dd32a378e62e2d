"""A PEFT adapter as its files say it is: what the checks hold the live model against."""

from __future__ import annotations

import json
import math
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pytest_llmload.worker.checkpoints.headers import ADAPTER_CONFIG, ADAPTER_WEIGHTS

#: What PEFT puts before the model's own names when it saves (peft/utils/save_and_load.py).
PREFIX = "base_model.model."
FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


class AdapterFiles:
    """adapter_config.json and the tensors of adapter_model.safetensors, read one at a time."""

    def __init__(self, path: str) -> None:
        self.config: dict[str, Any] = json.loads((Path(path) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        file: Any = safe_open(str(Path(path) / ADAPTER_WEIGHTS), framework="pt", device="cpu")
        self._file = file
        #: Tensor name as the model would have it without PEFT's own parts -> name in the file.
        self.names: dict[str, str] = {
            name.removeprefix(PREFIX).replace(".base_layer.", "."): name for name in list(file.keys())
        }

    def tensor(self, name: str) -> Any:
        """A tensor, by its key in ``names``, in the file's dtype."""
        return self._file.get_tensor(self.names[name])

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """The modules that the file has both LoRA factors for."""
        return tuple(
            name.removesuffix(f".{a}")
            for name in self.names
            for a, b in FACTORS
            if name.endswith(f".{a}") and f"{name.removesuffix(a)}{b}" in self.names
        )

    @cached_property
    def whole(self) -> tuple[str, ...]:
        """The tensors that stand for the model's own: modules that were trained as a whole, resized embeddings."""
        tuned = {f"{target}.weight" for target in self.targets}
        return tuple(name for name in self.names if ".lora_" not in name and name not in tuned)

    def factors(self, module: str) -> tuple[Any, Any]:
        """``A`` (rank x inputs) and ``B`` (outputs x rank) of a target; of an embedding the inputs are its rows."""
        a, b = next(pair for pair in FACTORS if f"{module}.{pair[0]}" in self.names)
        return self.tensor(f"{module}.{a}"), self.tensor(f"{module}.{b}")

    def scaling(self, module: str, rank: int) -> float:
        """What ``B @ A`` is multiplied by: alpha / rank, or alpha / sqrt(rank) (peft/tuners/lora/layer.py).

        ``alpha_pattern`` maps ends of module paths, as regular expressions, to an alpha of their own
        (peft/utils/other.py, ``get_pattern_key``).
        """
        alpha = self.config.get("lora_alpha", 8)
        for pattern, own in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = own
                break
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def is_plain_lora(self) -> bool:
        """Whether a weight changes by ``scaling * B @ A`` and nothing else."""
        special = ("use_dora", "alora_invocation_tokens", "arrow_config", "use_qalora", "lora_bias", "use_bdlora")
        return self.config.get("peft_type") == "LORA" and not any(self.config.get(name) for name in special)
