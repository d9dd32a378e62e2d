"""Specs and texts as they may be committed or published: without secrets, without this machine's paths, printable."""

from __future__ import annotations

import json
import re
from pathlib import PurePath
from typing import Any

from pytest_llmload.core.spec import canonical_json

HIDDEN = "***"
# Only at the end: HF_TOKEN is a secret, TOKENIZERS_PARALLELISM and max_new_tokens are not.
_SECRET_NAME = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|KEY|AUTH)$", re.IGNORECASE)
_SECRETS = (
    # Hub tokens, cloud keys, and user:password in addresses.
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"\bAKIA[0-9A-Z]{16}\b"), HIDDEN),
    (re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"), HIDDEN),
)


#: Control characters but for tab and line feed, and what no encoding can write.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def scrub(text: str) -> str:
    """The text with whatever looks like a secret replaced by ``***``, and as escapes what cannot be printed."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def bounded(text: str, most: int) -> str:
    """The first ``most`` characters of a text, and how many there were beyond them."""
    rest = len(text) - most
    return f"{text[:most]}… ({rest} more characters)" if rest > 0 else text


def portable_spec(identity: dict[str, Any]) -> dict[str, Any]:
    """A ``LoadSpec.identity()`` that is the same on every machine and tells no secret.

    Absolute paths become their last component; the value of a secret environment variable or option is hidden.
    """
    return {
        name: [[key, _option(key, value, encoded=name == "options")] for key, value in item]
        if name in ("options", "env")
        else _plain(item)
        for name, item in identity.items()
    }


def _option(name: str, value: str, *, encoded: bool) -> str:
    """One pair's value; a load's options are JSON, its environment variables are plain text."""
    if _SECRET_NAME.search(name):
        return canonical_json(HIDDEN) if encoded else HIDDEN
    return canonical_json(_plain(json.loads(value))) if encoded else str(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return scrub(PurePath(value).name if PurePath(value).is_absolute() else value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
