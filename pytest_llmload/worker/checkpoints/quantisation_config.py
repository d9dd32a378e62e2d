"""Read from a checkpoint's config how the checkpoint is quantised, by any tool."""

from __future__ import annotations

from pathlib import Path

from pytest_llmload.core.spec import AS_STORED, LoadSpec
from pytest_llmload.quantisation.base import FileFormat, describe_config, named_skips
from pytest_llmload.quantisation.registry import method_in_file, methods
from pytest_llmload.worker.checkpoints.digests import read_config


def read_format(directory: str | Path) -> FileFormat | None:
    """Return the format of a quantised checkpoint by its config.json, or by the text part of a composite one.

    Return None if it is not quantised. Raises LoadFailed if there is no readable config.
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
    """Return why a load cannot be as the spec requests, because the files are quantised differently; empty if it can.

    transformers then follows the file, with only a warning (transformers/quantizers/auto.py,
    ``merge_quantization_configs``), or raises. Do not call this for a user's own loader, which may ignore the config.
    """
    if found is None or spec.quant == AS_STORED or not known_method(found):
        return ""
    asked = spec.quant + (" with double quant" if spec.double_quant else "")
    stored = found.scheme + (" with double quant" if found.double_quant else "") or found.description
    if asked == stored:
        if not spec.compute_dtype or found.compute == spec.compute_dtype:
            return ""
        asked += f" computed in {spec.compute_dtype}"
        stored += f" computed in {found.compute}"
    return (
        f"{asked} was requested, but {stored} is stored: the checkpoint is quantised already, and what its config.json "
        "says wins; write quant('none'), or name a checkpoint that is not quantised"
    )


def known_method(found: FileFormat) -> bool:
    """Return true if the installed transformers supports the method; it loads others dense, with a warning."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    own = method_in_file(found.method)
    names = own.transformers_names if own is not None else ()
    return any(name in AUTO_QUANTIZATION_CONFIG_MAPPING for name in names or (found.method,))
