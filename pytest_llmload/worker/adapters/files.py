"""A PEFT adapter as its files describe it, which the checks compare the live model with."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pytest_llmload.core.errors import LoadFailed
from pytest_llmload.system.json_text import Unreadable, read_json, short
from pytest_llmload.worker.checkpoints.headers import ADAPTER_CONFIG, ADAPTER_WEIGHTS

#: Settings of a LoRA whose change is more than a product of two factors.
_SPECIAL = (
    *("use_dora", "alora_invocation_tokens", "arrow_config", "use_qalora", "lora_bias", "use_bdlora"),
    *("target_parameters", "trainable_token_indices", "layer_replication"),
)
#: Names of the initialisations that change the weight below the adapter.
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: The adapter's name, which live factors have and saved ones do not; PEFT loads a file with it too.
_LIVE = re.compile(r"(?<=\.lora_A|\.lora_B)\.default(?=\.weight$)")
FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
#: Prefixes of names in files that PEFT saves from a ``PeftModel`` (peft/utils/save_and_load.py), unlike transformers.
_PREFIXES = ("base_model.model.", "base_model.")


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Return an adapter's configuration. Raises LoadFailed, with one sentence, if it cannot be read."""
    path = directory / ADAPTER_CONFIG
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise LoadFailed(f"{directory} has no {ADAPTER_CONFIG}: it is not a PEFT adapter") from None
    except Unreadable as error:
        raise LoadFailed(f"{path} cannot be read: it {error}") from None
    if not isinstance(config, dict):
        raise LoadFailed(f"{path} is {short(config)}, expected is an object")
    for name, kinds in _TYPES.items():
        value = config.get(name)
        if value is not None and not isinstance(value, kinds):
            raise LoadFailed(f"{path}: {name} is {short(value)}, which PEFT does not write")
    return config


#: The fields of an adapter's configuration that are read, and their types; each may also be None.
_TYPES: dict[str, tuple[type, ...]] = {
    "peft_type": (str,),
    **dict.fromkeys(("lora_alpha", "r"), (int, float)),
    **dict.fromkeys(("alpha_pattern", "rank_pattern"), (dict,)),
}


class AdapterFiles(Mapping[str, Any]):
    """adapter_config.json and the tensors of adapter_model.safetensors, read one at a time, in the file's dtypes."""

    def __init__(self, path: str) -> None:
        self.config: dict[str, Any] = read_adapter_config(Path(path))
        file: Any = safe_open(str(Path(path) / ADAPTER_WEIGHTS), framework="pt", device="cpu")
        self._file = file
        #: Name without PEFT's prefix -> name in the file.
        self.names: dict[str, str] = {_LIVE.sub("", bare(name)): name for name in list(file.keys())}

    def __getitem__(self, name: str) -> Any:
        return self._file.get_tensor(self.names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Return the modules for which the file has both LoRA factors."""
        return tuple(
            name.removesuffix(f".{a}")
            for name in self.names
            for a, b in FACTORS
            if name.endswith(f".{a}") and f"{name.removesuffix(a)}{b}" in self.names
        )

    @cached_property
    def whole(self) -> dict[str, str]:
        """Return the model's tensors that the file replaces as a whole, with the names of the replacements in the file.

        They belong to modules that were trained as a whole, trained biases, and resized embeddings.
        """
        tuned = {f"{target}.weight" for target in self.targets}
        return {in_base(name): name for name in self if ".lora_" not in name and in_base(name) not in tuned}

    def modules(self, known: Iterable[str]) -> frozenset[str]:
        """Return the modules among ``known`` that the adapter's tensors belong to: the longest path in each name."""
        paths, found = frozenset(known) - {""}, set()
        for name in map(in_base, self):
            while name and name not in paths:
                name = name.rpartition(".")[0]
            found.add(name)
        if found == {""}:
            # Only tensors that all layers share are stored; the configuration names the layers.
            ends = tuple(f".{target}" for target in self.config.get("target_modules") or ())
            return frozenset(path for path in paths if f".{path}".endswith(ends))
        return frozenset(found - {""})

    def factors(self, module: str) -> tuple[Any, Any]:
        """Return ``A`` (rank x inputs) and ``B`` (outputs x rank) of a target; an embedding's inputs are its rows."""
        a, b = next(pair for pair in FACTORS if f"{module}.{pair[0]}" in self.names)
        return self[f"{module}.{a}"], self[f"{module}.{b}"]

    def scaling(self, module: str) -> float:
        """Return the factor of ``B @ A``: alpha / rank, or alpha / sqrt(rank) (peft/tuners/lora/layer.py)."""
        alpha, rank = self._of(module, "alpha_pattern", "lora_alpha"), self._of(module, "rank_pattern", "r")
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _of(self, module: str, patterns: str, otherwise: str) -> Any:
        """Return a setting that may differ by module, given by regular expressions for the ends of module paths.

        See peft/utils/other.py, ``get_pattern_key``.
        """
        for pattern, own in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return own
        return self.config.get(otherwise, 8)

    @property
    def is_plain_lora(self) -> bool:
        """Return true if the adapter changes a weight by ``scaling * B @ A`` and nothing else."""
        if str(self.config.get("init_lora_weights")).startswith(_REWRITING):
            return False
        return self.config.get("peft_type") == "LORA" and not any(self.config.get(name) for name in _SPECIAL)


def bare(name: str) -> str:
    """Return a name of PEFT without the prefix that stands for the model itself."""
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)


def in_base(name: str) -> str:
    """Return the name that a tensor with a bare name has in the model without the adapter."""
    return name.replace(".base_layer.", ".")
