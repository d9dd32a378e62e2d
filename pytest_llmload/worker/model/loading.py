"""The calls of ``from_pretrained`` that the built-in strategies end in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pytest_llmload.core.job import Job
from pytest_llmload.quantisation.registry import keep_offloaded_dense
from pytest_llmload.system.scratch import LOAD, Scratch
from pytest_llmload.worker.checkpoints.digests import read_config
from pytest_llmload.worker.checkpoints.gguf_files import only_file
from pytest_llmload.worker.model.loaded import Loaded


def model_class(job: Job) -> Any:
    """Return the class that loads: the spec's ``auto_class``, else the one that the checkpoint's config names.

    Raises ValueError where transformers has no such class.
    """
    import transformers

    config = read_config(Path(job.checkpoint.path))
    name = job.spec.auto_class
    if name is None and job.trust_remote_code and config.get("auto_map"):
        autos = [key for key in config["auto_map"] if key.startswith("AutoModel")]
        name = "AutoModelForCausalLM" if "AutoModelForCausalLM" in autos or not autos else autos[0]
    if name is None:
        name = (config.get("architectures") or ["AutoModelForCausalLM"])[0]
    found = getattr(transformers, name, None) or _registered(name)
    if found is None and job.spec.auto_class is not None:
        alike = difflib.get_close_matches(name, (each for each in dir(transformers) if each.startswith("AutoModel")), 3)
        meant = f": did you mean {' or '.join(alike)}?" if alike else ""
        raise ValueError(f"auto_class({name!r}): transformers {transformers.__version__} has no such class{meant}")
    if found is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no class {name!r}, which the checkpoint's config names; "
            "choose one with auto_class(), import the module that registers it with --llm-import, or allow the "
            "checkpoint's own code with --llm-trust-remote-code"
        )
    return found


def _registered(name: str) -> Any:
    """Return a class that code of the user's has registered with an auto class; None if there is none of that name."""
    from transformers.models.auto import modeling_auto

    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        for classes in getattr(mapping, "_extra_content", {}).values():
            for found in classes if isinstance(classes, tuple) else (classes,):
                if found.__name__ == name:
                    return found
    return None


def from_pretrained(job: Job, kwargs: dict[str, Any]) -> Loaded:
    """Load by the one call of ``from_pretrained`` that all built-in strategies end in."""
    if job.trust_remote_code:
        kwargs = {"trust_remote_code": True, **kwargs}
    if gguf := only_file(Path(job.checkpoint.path)):
        kwargs = {"gguf_file": gguf.name, **kwargs}
    model, info = model_class(job).from_pretrained(job.checkpoint.path, output_loading_info=True, **kwargs)
    return Loaded(
        job=job,
        model=model,
        loading_info={kind: _texts(keys) for kind, keys in info.items()},
        conversions=list(getattr(model, "_weight_conversions", None) or []),
    )


def load_with_map(job: Job, kwargs: dict[str, Any]) -> Loaded:
    """Load with a map of modules that may name ``cpu`` and ``disk``; the map is kept as the plan for the checks."""
    scratch = Scratch(LOAD)
    keep_offloaded_dense(job, kwargs["device_map"], kwargs.get("quantization_config"))
    try:
        loaded = from_pretrained(job, {"offload_folder": str(scratch.files), **kwargs})
    except BaseException:
        scratch.close()
        raise
    loaded.planned_map = kwargs["device_map"]
    # Weights on disk are read from it at every forward.
    loaded.scratch = scratch
    return loaded


def _texts(keys: Iterable[Any]) -> list[str]:
    """Return keys as text; a mismatched one is ``(name, shape in the file, shape in the model)``."""
    return sorted(f"{key[0]}: {key[1]} -> {key[2]}" if isinstance(key, tuple) else str(key) for key in keys)
