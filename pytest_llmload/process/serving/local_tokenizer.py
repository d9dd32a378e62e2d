"""The tokenizer of a served model, if its files are on this machine."""

from __future__ import annotations

from typing import Any

from pytest_llmload.core.job import Job


def load_tokenizer(job: Job) -> tuple[Any, str]:
    """Return the tokenizer, or None and, unless the model is random, why there is none: prompts are then words."""
    source = job.checkpoint.path or job.spec.model.partition("@")[0]
    if job.spec.model.startswith("random:") and not job.checkpoint.path:
        return None, ""
    try:
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=job.trust_remote_code)
    except Exception as error:  # noqa: BLE001 - without a tokenizer, prompts are words, and a note says so
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        return None, f"no tokenizer of the model is on this machine, so prompts are words ({why})"
    return found, ""
