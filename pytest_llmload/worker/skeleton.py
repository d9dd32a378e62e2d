"""A model without values, on torch's meta device: for the questions that are asked before a load."""

from __future__ import annotations

from typing import Any

from pytest_llmload.core.job import Job


def skeleton(job: Job) -> Any:
    """The model's modules and shapes, in the dtype of the load, tied as it will be."""
    import torch
    from transformers import AutoConfig

    from pytest_llmload.worker.strategies.base import model_class

    cls = model_class(job)
    config = AutoConfig.from_pretrained(job.checkpoint.path, trust_remote_code=job.trust_remote_code)
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    options: dict[str, Any] = {"dtype": names[job.spec.dtype]} if job.spec.dtype else {}
    with torch.device("meta"):
        if hasattr(cls, "from_config"):
            model = cls.from_config(config, trust_remote_code=job.trust_remote_code, **options)
        else:
            model = cls._from_config(config, **options)
    model.tie_weights()
    return model
