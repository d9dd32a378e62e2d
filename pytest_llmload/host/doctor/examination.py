"""All checks of this machine, the gravest finding first."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from pytest_llmload.host.doctor import disk, gpu, limits, python
from pytest_llmload.host.doctor.finding import ERROR, FINE, WARNING, Finding

_RANKS = {ERROR: 0, WARNING: 1, FINE: 2}


def examine(folder: Path, cache_dir: Path, needs: Mapping[str, int]) -> list[Finding]:
    """Return what every check found, errors first.

    Args:
        folder: Where pytest is started, whose files Python imports first.
        cache_dir: ``--llm-cache-dir``.
        needs: Place of :func:`pytest_llmload.host.doctor.disk.places` -> bytes that the planned load writes there.
    """
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        lambda: disk.check(cache_dir, needs, sys.executable),
        python.pip,
        gpu.binaries,
        gpu.torch_build,
        gpu.holders,
        lambda: python.shadowed(folder),
        python.conflicts,
        limits.shared_memory,
        limits.ulimits,
        python.interpreter,
    )
    return ordered(finding for check in checks for finding in check())


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings with the errors first, in the order of the checks."""
    return sorted(findings, key=lambda finding: _RANKS[finding.level])
