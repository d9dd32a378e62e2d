"""The two digests that identify a model: ``shape`` (what memory and time depend on) and ``weights`` (the content)."""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pytest_llmload.core.canonical import digest
from pytest_llmload.core.errors import LoadFailed
from pytest_llmload.system.files import replace_text
from pytest_llmload.system.json_text import Unreadable, read_json, short
from pytest_llmload.worker.checkpoints.headers import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Tensor
from pytest_llmload.worker.checkpoints.threads import workers

_LENGTH = 16
#: The most objects and lists of a config; one that lists each module of a quantised mixture of experts has a few.
_BRACKETS = 100_000
#: Integers of a config that decide on memory or work beside the tensors' shapes, by the names architectures give them.
_GEOMETRY = re.compile(
    r"(^|_)(heads?|layers?|experts|experts_per_tok(en)?|top_?k|groups?)$|^(head_dim|sliding_window|max_window_layers)$"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_config(directory: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json; empty if there is none, as only code of the user's can load it then.

    Raises LoadFailed, with one sentence, if it is damaged.
    """
    path = directory / "config.json"
    try:
        config = read_json(path, brackets=_BRACKETS)
    except FileNotFoundError:
        return {}
    except Unreadable as error:
        raise LoadFailed(f"{path} cannot be read: it {error}") from None
    if not isinstance(config, dict):
        raise LoadFailed(f"{path} does not contain a JSON object")
    _check_types(path, config)
    return config


#: The most fields of a config or of a part of it; those of the largest models have some 200.
_FIELDS = 10_000
#: The fields of a config that are read, and their types; each may also be None.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("num_attention_heads", "hidden_size", "num_key_value_heads"), (int, list, dict)),
    "quantization_config": (dict,),
    "architectures": (list,),
    **dict.fromkeys(("model_type", "dtype", "torch_dtype"), (str, dict)),
}


def _check_types(path: Path, config: dict[str, Any]) -> None:
    """Raise LoadFailed if an entry has a wrong type, at the top level or in a part of a composite model."""
    if len(config) > _FIELDS:
        raise LoadFailed(f"{path} has {len(config)} fields in one object, and no model's config has over {_FIELDS}")
    for name, kinds in _TYPES.items():
        value = config.get(name)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            expected = " or ".join(_KINDS[kind] for kind in kinds if kind is not dict or len(kinds) == 1)
            raise LoadFailed(f"{path}: {name} is {short(value)}, expected is {expected}")
    if not all(isinstance(name, str) for name in config.get("architectures") or ()):
        raise LoadFailed(f"{path}: architectures is {short(config['architectures'])}, expected is a list of names")
    for name, part in config.items():
        if name.endswith("_config") and isinstance(part, dict):
            _check_types(path, part)


_KINDS: dict[type, str] = {int: "a whole number", list: "a list", dict: "an object", str: "a text"}


def geometry(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config's fields that describe the shape of a load, but not those that a mere re-save may change.

    Names, paths, versions, dtypes (the tensors have them), token ids, dropout and defaults that newer versions spell
    out are left out, so that a fine-tune of a model keeps its digest.
    """
    found: dict[str, Any] = {
        key: value
        for key, value in config.items()
        if _GEOMETRY.search(key) and isinstance(value, int) and not isinstance(value, bool)
    }
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if found.get("num_key_value_heads") == heads:
        found.pop("num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 and found.get("head_dim") == hidden // heads:
        del found["head_dim"]
    if config.get("use_sliding_window") is False:
        found.pop("sliding_window", None)
    if "sliding_window" not in found:
        found.pop("max_window_layers", None)
    method = (config.get("quantization_config") or {}).get("quant_method")
    nested = {key: geometry(value) for key, value in config.items() if key.endswith("_config") and _is_model(value)}
    return {
        "model_type": config.get("model_type"),
        **found,
        **({"quant_method": method} if method else {}),
        **{key: value for key, value in nested.items() if value != {"model_type": None}},
    }


def _is_model(value: Any) -> bool:
    return isinstance(value, dict) and "quant_method" not in value


def shape_digest(config: dict[str, Any], tensors: list[Tensor]) -> str:
    """Return 16 hexadecimal digits over the config's geometry and every tensor's name, shape and stored dtype."""
    rows = sorted([tensor.name, list(tensor.shape), tensor.dtype] for tensor in tensors)
    return digest([geometry(config), rows], _LENGTH)


def random_weights_digest(version: int, tensors: list[Tensor]) -> str:
    """Return the digest of a random checkpoint: its values depend on ``version`` and the tensors' headers only."""
    return digest(["random", version, sorted([t.name, list(t.shape), t.dtype] for t in tensors)], _LENGTH)


def weights_digest(files: list[Path], cache_dir: Path) -> str:
    """Return 16 hexadecimal digits over the content of weight files.

    The SHA-256 of a blob in the hub's cache comes from its name, that of any other file from its content. The latter is
    cached in ``cache_dir`` by path, size and time of change, so that 25 GB are read once.
    """
    with ThreadPoolExecutor(workers()) as pool:
        hashes = list(pool.map(lambda path: _file_hash(path, cache_dir), files))
    return digest(sorted([path.name, value] for path, value in zip(files, hashes, strict=True)), _LENGTH)


def adapter_digest(directory: Path, cache_dir: Path) -> str:
    """Return 16 hexadecimal digits over the content of an adapter's two files."""
    files = (directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS)
    return digest([[path.name, _file_hash(path, cache_dir)] for path in files], _LENGTH)


def _file_hash(path: Path, cache_dir: Path) -> str:
    real = path.resolve()
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name):
        return real.name
    status = real.stat()
    entry = cache_dir / "digests" / digest([str(real), status.st_size, status.st_mtime_ns], 32)
    if entry.is_file():
        known = entry.read_text(encoding="ascii").strip()
        if _SHA256.fullmatch(known):
            return known
    hasher = hashlib.sha256()
    with real.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    replace_text(entry, hasher.hexdigest())
    return hasher.hexdigest()
