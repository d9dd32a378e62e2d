"""How a checkpoint's own config says that it is quantised, whoever quantised it.

The entries are those that transformers reads (transformers/utils/quantization_config.py) and that the tools write:
bitsandbytes, GPTQ, AWQ, FP8, MXFP4, compressed-tensors, torchao and others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_llmload.core.dtypes import SHORT_NAMES
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.worker.checkpoints.digests import read_config

BITSANDBYTES = "bitsandbytes"
#: Entries of a config that are worth telling, and what they are called.
_TOLD = {
    "bits": "{} bit",
    "w_bit": "{} bit",
    "fmt": "{}",
    "format": "{}",
    "quant_type": "{}",
    "group_size": "group={}",
    "q_group_size": "group={}",
    "weight_block_size": "block={}",
    "version": "{}",
    "desc_act": "act-order",
    "activation_scheme": "activations={}",
}
#: Entries that name modules which were left dense.
_SKIPS = ("llm_int8_skip_modules", "modules_to_not_convert", "ignore", "ignored_layers")


@dataclass(frozen=True)
class FileFormat:
    """What a checkpoint's ``quantization_config`` says."""

    #: ``bitsandbytes``, ``gptq``, ``awq``, ``fp8``, ``mxfp4``, ``compressed-tensors`` …
    method: str
    #: ``gptq 4 bit group=128``: for people.
    description: str
    #: ``nf4``, ``fp4``, ``int8`` where bitsandbytes made it.
    scheme: str = ""
    double_quant: bool = False
    #: ``fp32``, ``fp16``, ``bf16``: what bitsandbytes' 4-bit products are computed in.
    compute: str = ""
    #: Modules that it says were left dense.
    skips: tuple[str, ...] = ()


def read_format(directory: str | Path) -> FileFormat | None:
    """What config.json says of a quantised checkpoint, also in the text part of a composite one; None where it is not.

    Raises LoadFailed where there is no readable config.
    """
    config = read_config(Path(directory))
    parts = [config, *(part for name in ("text_config", "llm_config") if isinstance(part := config.get(name), dict))]
    found = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    if not isinstance(found, dict):
        return None
    skips = tuple(str(name) for key in _SKIPS for name in found.get(key) or ())
    four, eight = found.get("load_in_4bit"), found.get("load_in_8bit")
    if four or eight:
        scheme = str(found.get("bnb_4bit_quant_type", "fp4")) if four else "int8"
        nested = bool(four and found.get("bnb_4bit_use_double_quant"))
        dtype = str(found.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
        compute = SHORT_NAMES.get(dtype, "") if four else ""
        text = f"{BITSANDBYTES} {scheme}" + (" with double quant" if nested else "")
        return FileFormat(BITSANDBYTES, text, scheme, nested, compute, skips)
    method = str(found.get("quant_method", "unknown"))
    return FileFormat(method, " ".join([method, *_told(found)]), skips=skips)


def _told(config: dict[str, Any]) -> Iterator[str]:
    for key, text in _TOLD.items():
        value = config.get(key)
        if value not in (None, False, "", []):
            yield text.format("x".join(map(str, value)) if isinstance(value, list) else value)
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            size = weights.get("group_size")
            yield f"{weights.get('type', 'int')}{weights.get('num_bits', '')}" + (f" group={size}" if size else "")


def contradiction(spec: LoadSpec, found: FileFormat | None) -> str:
    """Why a load cannot be what the spec asks for: the files are quantised in another way already. Empty if it can.

    transformers then goes by the file, with no more than a warning (transformers/quantizers/auto.py,
    ``merge_quantization_configs``), or raises. A user's own loader may do as it likes.
    """
    if found is None or spec.quant == "none" or spec.strategy == "loader" or not known_method(found):
        return ""
    asked = spec.quant + (" with double quant" if spec.double_quant else "")
    stored = found.scheme + (" with double quant" if found.double_quant else "") or found.description
    if asked == stored:
        if not spec.compute_dtype or found.compute == spec.compute_dtype:
            return ""
        asked += f" computed in {spec.compute_dtype}"
        stored += f" computed in {found.compute}"
    return (
        f"{asked} was asked for, {stored} is stored: the checkpoint is quantised already, and what its config.json "
        "says wins; ask for quant('none'), or name a checkpoint that is not quantised"
    )


def known_method(found: FileFormat) -> bool:
    """Whether the installed transformers does anything about the method; for others it loads dense, with a warning."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return found.method == BITSANDBYTES or found.method in AUTO_QUANTIZATION_CONFIG_MAPPING
