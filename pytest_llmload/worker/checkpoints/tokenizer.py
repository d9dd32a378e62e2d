"""A working tokenizer without training data: byte-level BPE whose merges are spelled out letter by letter."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
_SPACE = "Ġ"  # the blank in byte-level BPE's alphabet

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_ROLES = ("pad_token_id", "bos_token_id", "eos_token_id")


def _byte_alphabet() -> list[str]:
    """Return the 256 characters that stand for bytes in byte-level BPE, printable ASCII first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    # Blank and line end precede the non-ASCII bytes, so that a tiny vocabulary has what English text needs.
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [characters[byte] for byte in (32, 10, *(b for b in range(33, 256)), *(b for b in range(32) if b != 10))]


def _merges() -> Iterator[tuple[str, str]]:
    """Yield 474,000 merges of existing parts: letter pairs, blank and pair, quadruples, blank and triple."""
    pairs = [a + b for a, b in itertools.product(_LETTERS, repeat=2)]
    yield from itertools.product(_LETTERS, repeat=2)
    yield from ((_SPACE, pair) for pair in pairs)
    yield from itertools.product(pairs, repeat=2)
    yield from ((_SPACE + pair, letter) for pair in pairs for letter in _LETTERS)


def special_tokens(config: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """Return text and id of ``pad_token`` …, for the ids that the config gives and the vocabulary has."""
    size, found = int(config["vocab_size"]), {}
    for key in _ROLES:
        ids = config.get(key)
        first = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(first, int) and 0 <= first < size:
            found[key.removesuffix("_id")] = first
    texts: dict[int, str] = {}
    for role, number in found.items():
        texts.setdefault(number, f"<|{role.removesuffix('_token')}|>")
    return {role: (texts[number], number) for role, number in found.items()}


def write_tokenizer(directory: Path, config: dict[str, Any]) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` with as many tokens as the config's ``vocab_size``.

    The special tokens have the config's ids; the rest are bytes, then merges. A vocabulary that is too small for all
    bytes maps the others to its first token.
    """
    size = int(config["vocab_size"])
    special = special_tokens(config)
    taken = {number: text for text, number in special.values()}
    free = [number for number in range(size) if number not in taken]
    alphabet = _byte_alphabet()
    vocabulary = {text: number for number, text in taken.items()}
    vocabulary |= dict(zip(alphabet, free, strict=False))
    merges = list(itertools.islice(_merges(), max(0, len(free) - len(alphabet))))
    vocabulary |= dict(zip((a + b for a, b in merges), free[len(alphabet) :], strict=False))
    unknown = next(iter(vocabulary)) if len(free) < len(alphabet) else None
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for number, text in sorted(taken.items())
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(merge) for merge in merges],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(config.get("max_position_embeddings") or config.get("n_positions") or 2048),
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        **{role: text for role, (text, _) in special.items()},
    }
    _write(directory / "tokenizer.json", tokenizer)
    _write(directory / "tokenizer_config.json", settings)


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
