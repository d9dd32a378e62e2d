"""Canonical JSON of a value, which is the same for equal values, and its digest."""

from __future__ import annotations

import hashlib
import json


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and without blanks, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: object, length: int = 64) -> str:
    """Return the first ``length`` hexadecimal digits of the SHA-256 of a plain value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]
