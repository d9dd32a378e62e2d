"""A PEFT adapter on a model, dense (``lora``) or quantised to nf4 (``qlora``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import Problem
from pytest_llmload.quantisation.bitsandbytes import NF4, BitsAndBytes
from pytest_llmload.strategies.base import Refused, Strategy

if TYPE_CHECKING:
    from pytest_llmload.worker.model.loaded import Loaded


#: Refused without trying: peft 0.21 leaves a copy of the checkpoint in the working directory before it fails.
_NO_DISK = (
    "the adapter cannot be attached to this model: part of it is on disk, where peft would copy the checkpoint to a "
    "folder below the working directory and then fail; keep the model off the disk, or merge the adapter beforehand"
)


class Lora(Strategy):
    """Attaches ``job.adapter`` to the model that the placement's strategy loaded, in one of two ways.

    ``peft``: ``PeftModel.from_pretrained``, which keeps 16-bit adapters in float32 and warns about missing keys.
    ``load_adapter``: transformers' own method, which keeps the base's dtype and logs a LOAD REPORT. A user's own
    loader attaches the adapter itself; what it returns is checked all the same.
    """

    name = "lora"
    summary = "A LoRA adapter on the model."
    fields: ClassVar[dict[str, Any]] = {"adapter": ""}
    packages = (*Strategy.packages, "peft")
    wrapping = "adapter"

    def wrap(self, job: Job, loaded: Loaded) -> Loaded:
        if loaded.own_code or job.adapter is None:
            return loaded
        import torch

        if job.spec.adapter_via == "peft" and "disk" in (getattr(loaded.model, "hf_device_map", None) or {}).values():
            # peft/peft_model.py, _update_offload: splits the checkpoint's path, and loses its root.
            raise Refused(Problem("adapter", _NO_DISK))
        try:
            loaded.model = _attached(job, loaded.model)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            raise Refused(Problem("adapter", f"the adapter cannot be attached to this model: {text}")) from error
        return loaded

    def applied(self, job: Job, loaded: Loaded) -> Iterable[Problem]:
        from pytest_llmload.worker.checks import merged

        yield from merged.check(loaded)

    def exercised(self, job: Job, loaded: Loaded) -> Iterable[Problem]:
        from pytest_llmload.worker.checks import adapter, merged

        yield from adapter.output(loaded)
        yield from merged.output(loaded)


class QLora(Lora):
    """A name only: the strategies ``nf4`` and ``lora`` carry out such a load."""

    name = "qlora"
    summary = "A LoRA adapter on a model in nf4."
    fields: ClassVar[dict[str, Any]] = {"quant": NF4, "adapter": ""}
    packages = (*Lora.packages, *BitsAndBytes.packages)


def _attached(job: Job, model: Any) -> Any:
    assert job.adapter is not None
    if job.spec.adapter_via == "load_adapter":
        model.load_adapter(job.adapter.path)
        if job.spec.adapter_merged:
            from peft.tuners.tuners_utils import BaseTunerLayer

            # transformers' integration has no way of its own to merge.
            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    module.merge()
        return model
    from peft import PeftModel

    # The device is where the base layers are: without it the file is read to the first GPU.
    device = "cpu" if job.device.kind == "cpu" else "cuda:0"
    wrapped = PeftModel.from_pretrained(model, job.adapter.path, torch_device=device)
    if job.spec.adapter_merged and wrapped.active_peft_config.is_prompt_learning:
        raise ValueError("it is a learned prompt, which has no weights that could be merged; leave out merged=True")
    return wrapped.merge_and_unload() if job.spec.adapter_merged else wrapped
