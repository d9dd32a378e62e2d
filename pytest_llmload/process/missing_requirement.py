"""Tell from an exception that a library refuses a load because this machine lacks a package or a device.

What a checkpoint needs depends on its format and on the release of transformers: AWQ needs ``autoawq`` for 4.57 and
``gptqmodel`` for 5. Each quantiser of transformers checks that itself and says what to install, for formats too that
this project does not know.
"""

from __future__ import annotations

import traceback

from pytest_llmload.core.libraries import is_installed

#: Where transformers looks for packages: folders and modules in front of its file's path.
_LOOKS = ("/transformers/quantizers/", "/transformers/integrations/", "/transformers/utils/quantization_config.py")
#: The method of a quantiser that looks for devices too.
_VALIDATES = "validate_environment"
#: Where a model's class looks for the package and the device of an attention implementation, and the methods that do.
_MODEL, _ATTENDS = "/transformers/modeling_utils.py", ("_flash_attn_import_error", "_flash_attn_2_can_dispatch")


def missing_requirement(error: BaseException) -> str:
    """Return which requirement of transformers this machine lacks, as one sentence; empty if the error is different."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    if frames[-1].filename.endswith(_MODEL) and frames[-1].name in _ATTENDS and isinstance(error, ImportError):
        text = " ".join(str(error).split())
        return f"the installed transformers lacks a package or a device for this attention: {text}"
    if not any(place in frames[-1].filename for place in _LOOKS):
        return ""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return f"the installed transformers lacks a package for this checkpoint: {text}" if _is_absent(error) else ""
    if frames[-1].name == _VALIDATES and isinstance(error, (RuntimeError, NotImplementedError)):
        return f"the installed transformers does not load this checkpoint on this device: {text}"
    return ""


def _is_absent(error: ImportError) -> bool:
    """Return true if a package is not installed, or if the library itself says so; an installed one may be broken."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        return not is_installed(error.name)
    return error.name is None
