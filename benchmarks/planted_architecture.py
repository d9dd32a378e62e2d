"""Three faults for any architecture, planted by patching the library in the load's process."""

from __future__ import annotations

from typing import Any

#: Fault -> the load that it is planted in.
FAULTS: dict[str, dict[str, Any]] = {
    "one Linear initialised again": {"dtype": "fp32"},
    "one Linear left dense": {"quant": "nf4"},
    "a kept copy": {"dtype": "fp32"},
}
_KEPT: list[Any] = []


def plant(fault: str) -> None:
    """Have what ``from_pretrained`` returns changed; each fault is on the largest Linear that is not the head.

    A Linear that is left dense is one that the library quantised: some models have a head that they do not name.
    """
    import torch
    import transformers

    loading = transformers.PreTrainedModel.from_pretrained.__func__

    def changed(cls: type, *args: Any, **kwargs: Any) -> Any:
        model, info = loading(cls, *args, **kwargs)
        module = _largest(model)
        if fault == "a kept copy":
            _KEPT.append(module.weight.detach().clone())
        elif fault == "one Linear initialised again":
            with torch.no_grad():
                torch.nn.init.normal_(module.weight, std=0.02)
        else:
            path = next(name for name, each in model.named_modules() if each is module)
            dense = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
            model.set_submodule(path, dense.to(torch.float32))
        return model, info

    transformers.PreTrainedModel.from_pretrained = classmethod(changed)


def _largest(model: Any) -> Any:
    import torch
    import transformers

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    base = getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    linear = [module for module in base.modules() if isinstance(module, kinds) and module is not head]
    quantised = [module for module in linear if module.weight.dtype == torch.uint8]
    return max(quantised or linear, key=lambda module: module.weight.numel())


def said(fault: str, result: dict[str, Any]) -> str:
    """Return what a load with a fault was told to be; empty where the fault was missed."""
    if fault == "a kept copy":
        held = result["metrics"].get("host.other_tensors", 0)
        return next((note for note in result["notes"] if "is not part of the model" in note), "") if held else ""
    check = {"one Linear initialised again": "values", "one Linear left dense": "quantised"}[fault]
    return next((problem["message"] for problem in result["problems"] if problem["check"] == check), "")
