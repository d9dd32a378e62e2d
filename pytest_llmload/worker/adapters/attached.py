"""An adapter in a live model, its tensors by the names that its file gives them: PEFT's own functions say which."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from pytest_llmload.worker.adapters.files import bare
from pytest_llmload.worker.adapters.wrapping import Wrapping

#: Settings that name the tokens which the adapter reacts to.
_TOKENS = ("alora_invocation_tokens", "token_indices", "trainable_token_indices")
#: Settings of adapters for several tasks (peft/tuners/poly, peft/tuners/multitask_prompt_tuning).
_TASKS = ("n_tasks", "num_tasks")


class Attached:
    """The adapters that PEFT put into a model, and the one of them that is in use."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._wrapping = Wrapping(dict(model.named_modules()))
        #: The module that knows the adapters' configurations: a PeftModel, or the model itself.
        self.host: Any = next((module for module in model.modules() if _has_configs(module)), None)
        #: Adapter's name -> its configuration in the model.
        self.configs: Mapping[str, Any] = getattr(self.host, "peft_config", None) or {}

    @property
    def is_there(self) -> bool:
        """Whether any module of PEFT is in the model."""
        return bool(self._wrapping.own)

    @property
    def name(self) -> str:
        """The adapter that is held against the file: where a loader attached several the active one, else the first."""
        used = [name for layer in self._wrapping.layers.values() for name in active_names(layer)]
        return next((name for name in used if name in self.configs), next(iter(self.configs), "default"))

    @property
    def config(self) -> Any:
        """The configuration of that adapter; None where PEFT keeps none."""
        return self.configs.get(self.name)

    def stored(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Name in the adapter's file -> tensor, as PEFT would save the adapter from ``tensors`` of this model."""
        from peft import get_peft_model_state_dict

        # Embeddings that were resized, which PEFT may look up on a hub, are whole tensors of the base.
        found = get_peft_model_state_dict(
            self.host, state_dict=dict(tensors), adapter_name=self.name, save_embedding_layers=False
        )
        return {bare(name): tensor for name, tensor in found.items()}

    @property
    def renames(self) -> bool:
        """Whether this version of PEFT renames and fuses an adapter's tensors as transformers 5 does the model's."""
        return find_spec("peft.utils.transformers_weight_conversion") is not None

    def converted(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The file's tensors by the names, and in the form, that transformers 5 gives what it renames and fuses."""
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

        found = convert_peft_adapter_state_dict_for_transformers(
            model=self.host, peft_config=self.config, adapter_state_dict=dict(tensors), adapter_name=self.name
        )
        return {bare(name): tensor for name, tensor in found.items()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without its adapters; enabling them again makes them trainable, which is undone."""
        trained = [(param, param.requires_grad) for param in self.host.parameters()]
        layers = list(self._wrapping.layers.values())
        try:
            if hasattr(self.host, "disable_adapter"):
                with self.host.disable_adapter():
                    yield
            else:
                for layer in layers:
                    layer.enable_adapters(False)
                yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for param, requires_grad in trained:
                param.requires_grad_(requires_grad)

    def arguments(self, batch: int, device: Any) -> dict[str, Any]:
        """Inputs without which the model with the adapter does not run: the task of each row, the first one."""
        tasks = [getattr(self.config, setting, None) for setting in _TASKS]
        if not any(tasks) or not hasattr(self.host, "disable_adapter") or self.host._adapters_disabled:
            return {}
        return {"task_ids": torch.zeros(batch, dtype=torch.long, device=device)}

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids that the adapter reacts to, in its order; none where it reacts to every token."""
        found: list[int] = []
        for setting in _TOKENS:
            value = getattr(self.config, setting, None) or ()
            for part in value.values() if isinstance(value, dict) else (value,):
                found += [int(token) for token in part]
        return tuple(found)


def active_names(layer: Any) -> list[str]:
    """The adapters that a layer of PEFT uses."""
    names: Any = layer.active_adapters if hasattr(layer, "active_adapters") else layer.active_adapter
    return [names] if isinstance(names, str) else list(names)


def _has_configs(module: Any) -> bool:
    peft = sys.modules.get("peft")
    return "peft_config" in vars(module) or (peft is not None and isinstance(module, peft.PeftModel))
