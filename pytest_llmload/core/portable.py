"""Make specs and texts safe to commit or publish: without secrets, without this machine's paths, printable."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from functools import lru_cache
from pathlib import PurePath
from typing import Any

from pytest_llmload.core.canonical import canonical_json

HIDDEN = "***"
# Only at the end: HF_TOKEN and --api-key are secrets, TOKENIZERS_PARALLELISM and max_new_tokens are not.
_SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(?:API)?KEY|AUTH|AUTHORIZATION|COOKIE)$", re.IGNORECASE
)
_SECRETS = (
    # Tokens of the hub, of GitHub and of APIs (one long run of letters and digits: a model may be called sk-…), cloud
    # keys, HTTP's Authorization header, and user:password in addresses.
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"\bgh[pousr]_[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"\bgithub_pat_[A-Za-z0-9_]{16,}"), HIDDEN),
    (re.compile(r"\bsk-(?:[A-Za-z0-9]+-)*[A-Za-z0-9_]{16,}[A-Za-z0-9_-]*"), HIDDEN),
    (re.compile(r"\bAKIA[0-9A-Z]{16}\b"), HIDDEN),
    (re.compile(r"\b((?:Bearer|Authorization: *Basic) +)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"), HIDDEN),
)


#: The longest text, in characters, that is taken for a name which comes again.
_NAME = 80
#: Characters that the value of a variable must have to be treated as a secret.
_SHORTEST = 6
#: Control characters except tab and line feed, marks that change the direction of text, and lone surrogates, which no
#: encoding can write.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def scrub(text: str) -> str:
    """Return the text with secrets replaced by ``***`` and unprintable characters replaced by escapes.

    Secrets are texts with the form of a token or key, and the values of environment variables with names such as
    ``HF_TOKEN`` or ``API_KEY``.
    """
    return scrubber()(text)


def scrubber() -> Callable[[str], str]:
    """Return :func:`scrub` for many texts, with the environment as it is now: reading it takes longer than a text."""
    secrets = _secret_values(tuple(os.environ.items()))
    return lambda text: (_scrubbed_name if len(text) <= _NAME else _scrubbed)(text, secrets)


def _scrubbed(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


#: Names of metrics, modules and units are most of a report's texts, and are the same in each of its loads.
_scrubbed_name = lru_cache(maxsize=1 << 13)(_scrubbed)


@lru_cache(maxsize=1)
def _secret_values(environment: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Return the values of secret variables, the longest first, since one may contain another.

    Short values are ignored: hiding every ``true`` or ``1`` would make texts unreadable.
    """
    # Texts are scrubbed line by line, and a key may have several.
    lines = {line for name, value in environment if _SECRET_NAME.search(name) for line in (value, *value.splitlines())}
    return tuple(sorted((line for line in lines if len(line) >= _SHORTEST), key=len, reverse=True))


def bounded(text: str, most: int) -> str:
    """Return the first ``most`` characters of a text, followed by the number of characters that were cut off."""
    rest = len(text) - most
    return f"{text[:most]}… ({rest} more characters)" if rest > 0 else text


def portable_spec(identity: dict[str, Any]) -> dict[str, Any]:
    """Return a ``LoadSpec.identity()`` in a form that is the same on every machine and holds no secrets.

    Absolute paths become their last component. The values of secret environment variables, options, map keys and flags
    of a command are hidden. A command becomes a list of arguments, however it was written.
    """
    return {
        name: [[key, _option(key, value, encoded=name == "options")] for key, value in item]
        if name in ("options", "env")
        else _plain(item)
        for name, item in identity.items()
    }


def _option(name: str, value: str, *, encoded: bool) -> str:
    """Return the portable value of one pair; a load's options are JSON, its environment variables are plain text."""
    if _SECRET_NAME.search(name):
        return canonical_json(HIDDEN) if encoded else HIDDEN
    if not encoded:
        return str(_plain(value))
    decoded = json.loads(value)
    return canonical_json(_arguments(decoded) if name == "command" else _plain(decoded))


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return scrub(PurePath(value).name if PurePath(value).is_absolute() else value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: HIDDEN if _SECRET_NAME.search(key) else _plain(item) for key, item in value.items()}
    return value


def _arguments(command: Any) -> Any:
    """Return a command's arguments; VALUE is hidden in ``--api-key VALUE``, ``--api-key=VALUE``, ``API_KEY=VALUE``."""
    words = _words(command) if isinstance(command, str) else command
    if not isinstance(words, list):
        return _plain(words)
    found: list[Any] = []
    # True if the previous word is a flag whose value is a secret; the value may be absent.
    is_awaited = False
    for word in words:
        text = word if isinstance(word, str) else ""
        name, separator, value = text.partition("=")
        is_secret = bool(_SECRET_NAME.search(name))
        if is_awaited and not text.startswith("-"):
            found.append(HIDDEN)
        elif separator:
            found.append(f"{_plain(name)}={HIDDEN if is_secret else _plain(value)}")
        else:
            found.append(_plain(word))
        is_awaited = is_secret and not separator and name.startswith("-")
    return found


def _words(text: str) -> list[str]:
    """Split a command as a shell does, or at blanks if a quote is never closed; starting it then reports the error."""
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()
