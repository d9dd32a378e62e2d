"""Arguments of markers that are more than one word, checked. ``where`` names the test and the argument in errors."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from pytest_llmload.core.canonical import canonical_json
from pytest_llmload.core.quoting import quoted
from pytest_llmload.core.units import parse_bytes


def limits(value: object, where: str) -> tuple[tuple[str, int], ...]:
    """Return ``max_memory={0: "10GiB", "cpu": "30GiB"}`` as sorted pairs of device and bytes. Raises UsageError."""
    if not isinstance(value, dict) or not value:
        raise pytest.UsageError(f"{where}: {quoted(value)} is not a map such as {{0: '10GiB', 'cpu': '30GiB'}}")
    pairs = []
    for device, size in value.items():
        if not (type(device) is int and device >= 0) and device not in ("cpu", "disk"):
            raise pytest.UsageError(f"{where}: {quoted(device)} is not a device: write a GPU's index, 'cpu' or 'disk'")
        try:
            pairs.append((str(device), size if type(size) is int else parse_bytes(size)))
        except ValueError as error:
            raise pytest.UsageError(f"{where}: {error}") from None
    return tuple(sorted(pairs))


def flag(value: object, where: str) -> bool:
    """Return a boolean argument. Raises UsageError."""
    if not isinstance(value, bool):
        raise pytest.UsageError(f"{where}={quoted(value)} is not a boolean; write True or False")
    return value


def names(value: object, where: str) -> tuple[str, ...]:
    """Return a list of names as a tuple. Raises UsageError, also for a single text."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise pytest.UsageError(f"{where}: {quoted(value)} is not a list of names; write one such as ['lm_head']")
    return tuple(value)


def as_json(value: object, where: str) -> str:
    """Return a value as canonical JSON. Raises UsageError if it is not plain data."""
    try:
        return canonical_json(json.loads(json.dumps(value)))
    except (TypeError, ValueError):
        raise pytest.UsageError(
            f"{where}: {quoted(value)} cannot go to the load's process: plain values only (numbers, strings, lists, "
            "maps)"
        ) from None
