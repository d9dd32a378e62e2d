"""The tensors in a checkpoint of an architecture, as transformers itself builds it on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_llmload.worker.checkpoints.headers import Tensor

#: transformers' names of dtypes -> those of safetensors.
STORED_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def stored_dtype(config: dict[str, Any]) -> str:
    """Return safetensors' name of a config's dtype; fp32 if the config names none, as in transformers.

    Raises ValueError for a dtype that random values do not exist for.
    """
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in STORED_DTYPES:
        raise ValueError(f"the config's dtype is {name!r}; random weights exist in {', '.join(STORED_DTYPES)} only")
    return STORED_DTYPES[name]


def meta_model(
    directory: Path,
    *,
    trust_remote_code: bool = False,
    dtype: Any = None,
    auto_class: str | None = None,
    layers: int | None = None,
) -> Any:
    """Return the model that ``directory``'s config.json describes, on the meta device, so that nothing is allocated.

    Its class is ``auto_class``, else the one that the config names, else AutoModelForCausalLM's. ``dtype`` is that of
    its parameters (default: as the config says); ``layers`` limits the number of its decoder layers. Raises ValueError,
    with one sentence, if the installed transformers does not know the architecture.
    """
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if layers is not None:
            _cut(config, layers)
        named = (getattr(config, "architectures", None) or [""])[0]
        cls = getattr(transformers, auto_class or named, None) or transformers.AutoModelForCausalLM
        config = _part_for(cls, config)
        with torch.device("meta"):
            if hasattr(cls, "from_config"):  # an auto class
                return cls.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)
            return cls._from_config(config, dtype=dtype)
    except Exception as error:  # a config can fail anywhere in a model's own code
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"transformers {transformers.__version__} cannot build the architecture of {directory}/config.json: {first}"
        ) from error


def _cut(config: Any, layers: int) -> None:
    """Cut a config to its first ``layers`` decoder layers, and its lists with one entry for each layer accordingly."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in {id(part): part for part in (config, text)}.values():
        count = getattr(part, "num_hidden_layers", None)
        if not isinstance(count, int) or count <= layers:
            continue
        for name, value in list(vars(part).items()):
            if isinstance(value, list) and len(value) == count:
                setattr(part, name, value[:layers])
        part.num_hidden_layers = layers


def _part_for(cls: Any, config: Any) -> Any:
    """Return the part of a composite config that a class is built from: the text part for a text model's class."""
    wanted = getattr(cls, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {})
    return next((part for part in parts if isinstance(part, wanted)), config)


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config's fields for the part that reads tokens; they override fields of the top level.

    Models of several parts nest it; it is the part that has a vocabulary.
    """
    if isinstance(config.get("vocab_size"), int):
        return config
    parts = [part for name, part in config.items() if isinstance(part, dict) and name != "quantization_config"]
    # The decoder of two text models generates, and comes last.
    named = sorted(parts, key=lambda part: "text" in str(part.get("model_type", "")))
    found = next((text_part(part) for part in reversed(named) if "vocab_size" in text_part(part)), None)
    return config if found is None else {**found, **{name: value for name, value in config.items() if name in _TOKENS}}


#: Fields about special tokens, which both levels of a composite config may have.
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "is_encoder_decoder")


def tensors_of(model: Any, dtype: str) -> list[Tensor]:
    """Return the tensors of a model's checkpoint on disk, with tied weights once, sorted by name.

    transformers 5 uses different names in memory and on disk for some modules (fused experts). Its own reverse
    conversion gives the names on disk, which transformers 4 uses in memory too.
    """
    own = dict(model.named_parameters(remove_duplicate=True))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = {name: value for name, value in model.state_dict().items() if name in own or name not in parameters}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4: names in memory are names on disk
        pass
    else:
        state = revert_weight_conversion(model, state)
    return sorted(
        (
            Tensor(name, tuple(value.shape), dtype if value.is_floating_point() else _integer_dtype(value))
            for name, value in state.items()
        ),
        key=lambda tensor: tensor.name,
    )


def _integer_dtype(value: Any) -> str:
    name = str(value.dtype).removeprefix("torch.")
    return "BOOL" if name == "bool" else name.replace("uint", "U").replace("int", "I")
