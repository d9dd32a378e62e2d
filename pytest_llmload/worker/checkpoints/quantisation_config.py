"""How a checkpoint's own config says that it is quantised, whoever quantised it."""

from __future__ import annotations

from pathlib import Path

from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.quantisation.base import FileFormat, describe_config, named_skips
from pytest_llmload.quantisation.registry import methods
from pytest_llmload.worker.checkpoints.digests import read_config

__all__ = ["FileFormat", "contradiction", "known_method", "read_format"]


def read_format(directory: str | Path) -> FileFormat | None:
    """Return what config.json says of a quantised checkpoint, also in the text part of a composite one.

    None if it is not quantised. Raises LoadFailed if there is no readable config.
    """
    config = read_config(Path(directory))
    parts = [config, *(part for name in ("text_config", "llm_config") if isinstance(part := config.get(name), dict))]
    found = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    if not isinstance(found, dict):
        return None
    described = (described for method in methods() if (described := method.described(found)) is not None)
    name = str(found.get("quant_method", "unknown"))
    return next(described, None) or FileFormat(name, describe_config(found), skips=named_skips(found), config=found)


def contradiction(spec: LoadSpec, found: FileFormat | None) -> str:
    """Return why a load cannot be what the spec asks for: the files are quantised in a different way. Empty if it can.

    transformers then goes by the file, with no more than a warning (transformers/quantizers/auto.py,
    ``merge_quantization_configs``), or raises. A user's own loader may do as it likes: do not ask for one.
    """
    if found is None or spec.quant == "none" or not known_method(found):
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
    """Return whether the installed transformers acts on the method; others it loads dense, with a warning."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    own = next((method for method in methods() if found.method in method.file_methods), None)
    names = own.transformers_names if own is not None else ()
    return any(name in AUTO_QUANTIZATION_CONFIG_MAPPING for name in names or (found.method,))
