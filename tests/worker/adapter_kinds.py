"""One adapter of each kind that PEFT registers, and of the LoRA variants, as a bare script trains and saves them."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

ATTENTION = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Kind:
    """An adapter kind: PEFT's configuration class and the arguments that a small model needs."""

    config: str
    arguments: dict[str, Any] = field(default_factory=dict)


def lora(**arguments: Any) -> Kind:
    return Kind("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, **arguments})


def prompt(config: str, **arguments: Any) -> Kind:
    return Kind(config, {"num_virtual_tokens": 4, **arguments})


def layers(config: str, **arguments: Any) -> Kind:
    return Kind(config, {"target_modules": ATTENTION, **arguments})


KINDS: dict[str, Kind] = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "lora_bias": lora(lora_bias=True),
    "bias_all": lora(bias="all"),
    "rank_pattern": lora(rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3}),
    "layer_replication": lora(layer_replication=[[0, 2], [1, 2]]),
    "modules_to_save": lora(modules_to_save=["lm_head"]),
    "embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "head": lora(target_modules=["lm_head", "q_proj"]),
    "token_indices": lora(trainable_token_indices=[3, 5, 600]),
    "token_indices_targeted": lora(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5, 600]}, modules_to_save=["norm"]
    ),
    "qalora": lora(use_qalora=True, qalora_group_size=16),
    "alora": lora(alora_invocation_tokens=[7, 8, 9]),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora"),
    "eva": lora(init_lora_weights="eva"),
    "loftq": lora(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "adalora": Kind("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ATTENTION}),
    "adamss": layers("AdamssConfig", r=8, num_subspaces=2),
    "adaption_prompt": Kind("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2}),
    "beft": layers("BeftConfig"),
    "boft": layers("BOFTConfig", boft_block_size=8),
    "c3a": layers("C3AConfig", block_size=16),
    "cartridge": prompt("CartridgeConfig"),
    "cpt": Kind(
        "CPTConfig", {"cpt_token_ids": [1, 2, 3, 4], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]}
    ),
    "deft": layers("DeftConfig", r=4),
    "delora": layers("DeloraConfig", r=4),
    "fourierft": layers("FourierFTConfig", n_frequency=50),
    "frod": layers("FrodConfig", progressbar=False),
    "glora": layers("GloraConfig", r=4),
    "gralora": layers("GraloraConfig", r=4),
    "hira": layers("HiraConfig", r=4),
    "hra": layers("HRAConfig", r=4),
    "ia3": layers("IA3Config", feedforward_modules=[]),
    "lily": layers("LilyConfig", r=4),
    "ln_tuning": layers("LNTuningConfig", target_modules=["norm"]),
    "loha": layers("LoHaConfig", r=4),
    "lokr": layers("LoKrConfig", r=4),
    "miss": layers("MissConfig", r=4),
    "multitask_prompt_tuning": prompt("MultitaskPromptTuningConfig", num_tasks=2),
    "oft": layers("OFTConfig", oft_block_size=16),
    "oft_shared": layers("OFTConfig", oft_block_size=16, block_share=True),
    "osf": layers("OSFConfig"),
    "p_tuning": prompt("PromptEncoderConfig", encoder_hidden_size=32),
    "p_tuning_lstm": prompt("PromptEncoderConfig", encoder_hidden_size=32, encoder_reparameterization_type="LSTM"),
    "peanut": layers("PeanutConfig", r=4),
    "poly": layers("PolyConfig", r=4, n_tasks=2, n_skills=2),
    "prefix": prompt("PrefixTuningConfig"),
    "prefix_projection": prompt("PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=32),
    "prompt_tuning": prompt("PromptTuningConfig"),
    "psoft": layers("PsoftConfig", r=4, psoft_alpha=4),
    "pvera": layers("PveraConfig", r=8),
    "randlora": layers("RandLoraConfig", r=8),
    "randlora_not_saved": layers("RandLoraConfig", r=8, save_projection=False),
    "road": layers("RoadConfig", group_size=16),
    "shadow": Kind("ShadowConfig", {"r": 4}),
    "shira": layers("ShiraConfig", r=4, random_seed=1),
    "supertuning": layers("SupertuningConfig"),
    "tinylora": layers("TinyLoraConfig", u=8),
    "tinylora_not_saved": layers("TinyLoraConfig", u=8, save_projection=False),
    "trainable_tokens": Kind("TrainableTokensConfig", {"token_indices": [3, 5, 600]}),
    "unilora": layers("UniLoraConfig"),
    "unilora_indices": layers("UniLoraConfig", save_indices=True),
    "vblora": layers("VBLoRAConfig", num_vectors=16, vector_length=32),
    "vblora_topk": layers("VBLoRAConfig", num_vectors=16, vector_length=32, save_only_topk_weights=True),
    "vera": layers("VeraConfig", r=8),
    "vera_not_saved": layers("VeraConfig", r=8, save_projection=False),
    "waveft": layers("WaveFTConfig", n_frequency=50),
}


def configuration(kind: Kind) -> Any:
    """PEFT's configuration of a kind."""
    return getattr(peft, kind.config)(task_type="CAUSAL_LM", **kind.arguments)


def save(kind: Kind, model: Any, directory: Path) -> None:
    """Attach an adapter of the kind to the model, move its trained values at random, and save it: no plugin in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, configuration(kind))
        generator = torch.Generator().manual_seed(1)
        for param in wrapped.parameters():
            if param.requires_grad:
                param.data += 0.05 * torch.randn(param.shape, generator=generator).to(param.dtype)
        # Its README is a template that is compiled for each adapter, which takes longest of all.
        wrapped.create_or_update_model_card = lambda *_: None
        wrapped.save_pretrained(directory)


def base(path: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


@cache
def _read(path: str) -> Any:
    return base(path)


def fresh(path: str) -> Any:
    """A model that no other test has, copied from one that is read once and never changed."""
    return copy.deepcopy(_read(path))
