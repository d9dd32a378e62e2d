"""An adapter in a live model, with its tensors under the names that PEFT's own functions give them in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from pytest_llmload.worker.adapters.files import bare
from pytest_llmload.worker.adapters.wrapping import Wrapping

#: Settings that name the tokens that the adapter reacts to.
_TOKENS = ("alora_invocation_tokens", "token_indices", "trainable_token_indices")
#: Settings of adapters for several tasks (peft/tuners/poly, peft/tuners/multitask_prompt_tuning).
_TASKS = ("n_tasks", "num_tasks")


class Attached:
    """The adapters that PEFT has put into a model, and the one of them that is in use."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._wrapping = Wrapping(dict(model.named_modules()))
        #: The module that has the adapters' configurations: a PeftModel, or the model itself.
        self.host: Any = next((module for module in model.modules() if _has_configs(module)), None)
        #: Adapter's name -> its configuration in the model.
        self.configs: Mapping[str, Any] = getattr(self.host, "peft_config", None) or {}

    @property
    def is_there(self) -> bool:
        """Return true if a module of PEFT is in the model."""
        return bool(self._wrapping.own)

    @property
    def name(self) -> str:
        """Return the name of the adapter to compare with the file: the active one of several, else the first."""
        used = [name for layer in self._wrapping.layers.values() for name in active_names(layer)]
        return next((name for name in used if name in self.configs), next(iter(self.configs), "default"))

    @property
    def config(self) -> Any:
        """Return the configuration of that adapter; None if PEFT keeps none."""
        return self.configs.get(self.name)

    def stored(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Return the tensors that PEFT would save from ``tensors`` of this model, by their names in the file."""
        from peft import get_peft_model_state_dict

        # Resized embeddings, for which PEFT may ask the hub, are whole tensors of the base.
        found = get_peft_model_state_dict(
            self.host, state_dict=dict(tensors), adapter_name=self.name, save_embedding_layers=False
        )
        return {bare(name): tensor for name, tensor in found.items()}

    @property
    def renames(self) -> bool:
        """Return true if this version of PEFT renames and fuses an adapter's tensors, as transformers 5 does."""
        return find_spec("peft.utils.transformers_weight_conversion") is not None

    def converted(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Return the file's tensors, renamed and fused as transformers 5 does it."""
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

        found = convert_peft_adapter_state_dict_for_transformers(
            model=self.host, peft_config=self.config, adapter_state_dict=dict(tensors), adapter_name=self.name
        )
        return {bare(name): tensor for name, tensor in found.items()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable the adapters while the context is open; undo that enabling them again makes them trainable."""
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
        """Return the further inputs that the model with the adapter needs: each row's task, which is the first one."""
        tasks = [getattr(self.config, setting, None) for setting in _TASKS]
        if not any(tasks) or not hasattr(self.host, "disable_adapter") or self.host._adapters_disabled:
            return {}
        return {"task_ids": torch.zeros(batch, dtype=torch.long, device=device)}

    @property
    def tokens(self) -> tuple[int, ...]:
        """Return the token ids that the adapter reacts to, in its order; none if it reacts to every token."""
        found: list[int] = []
        for setting in _TOKENS:
            value = getattr(self.config, setting, None) or ()
            for part in value.values() if isinstance(value, dict) else (value,):
                found += [int(token) for token in part]
        return tuple(found)


def active_names(layer: Any) -> list[str]:
    """Return the names of the adapters that a layer of PEFT uses."""
    names: Any = layer.active_adapters if hasattr(layer, "active_adapters") else layer.active_adapter
    return [names] if isinstance(names, str) else list(names)


def _has_configs(module: Any) -> bool:
    peft = sys.modules.get("peft")
    return "peft_config" in vars(module) or (peft is not None and isinstance(module, peft.PeftModel))
