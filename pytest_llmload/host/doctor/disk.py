"""Disk space where the environment, the hub's cache, built checkpoints, and temporary and offloaded files live."""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from pytest_llmload.core.units import format_bytes
from pytest_llmload.host.doctor.finding import ERROR, FINE, WARNING, Finding

#: Bytes that stay free for what other processes write meanwhile.
SPARE = 256 << 20
#: Free space under which installing or downloading anything soon fails.
_LITTLE = 1 << 30

ENVIRONMENT, HUB, BUILT, TEMPORARY = "environment", "hub cache", "built checkpoints", "temporary and offloaded files"
#: Place -> what moves it elsewhere.
_REMEDIES = {
    ENVIRONMENT: "{python} -m pip cache purge",
    HUB: "hf cache ls && export HF_HOME=/a/larger/disk/huggingface",
    BUILT: "rm -r {path} && pytest … --llm-cache-dir=/a/larger/disk",
    TEMPORARY: "export TMPDIR=/a/larger/disk",
}


def places(cache_dir: Path) -> dict[str, Path]:
    """Return the folders that loads and installations write to; they need not exist."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return {
        ENVIRONMENT: Path(sysconfig.get_path("purelib")),
        HUB: Path(os.environ.get("HF_HUB_CACHE") or home / "hub"),
        BUILT: cache_dir,
        TEMPORARY: Path(tempfile.gettempdir()),
    }


def free(path: Path) -> int:
    """Return the bytes that are free where a folder is, or will be made."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def shortage(path: Path, needed: int) -> str:
    """Return why so many bytes cannot be written below ``path``; empty if they can."""
    room = free(path)
    if needed + SPARE <= room:
        return ""
    return f"needs {format_bytes(needed + SPARE)} in {path}, where {format_bytes(room)} are free"


def check(cache_dir: Path, needs: Mapping[str, int], python: str) -> Iterator[Finding]:
    """Yield a finding for each place; ``needs`` are the bytes that the planned load will write there.

    Places on one file system share their free space.
    """
    where = places(cache_dir)
    together: dict[int, int] = defaultdict(int)
    for name, path in where.items():
        together[_device(path)] += needs.get(name, 0)
    for name, path in where.items():
        room, needed = free(path), together[_device(path)] if needs.get(name) else 0
        command = _REMEDIES[name].format(path=path, python=python)
        if needed and needed + SPARE > room:
            text = f"the load {shortage(path, needed)} ({name})"
            yield Finding("disk", ERROR, text, command)
        elif room < SPARE:
            yield Finding("disk", ERROR, f"{format_bytes(room)} are free in {path} ({name}): the disk is full", command)
        elif room < _LITTLE:
            yield Finding("disk", WARNING, f"only {format_bytes(room)} are free in {path} ({name})", command)
        else:
            takes = f"; the load takes {format_bytes(needs[name])} there" if needs.get(name) else ""
            yield Finding("disk", FINE, f"{format_bytes(room)} are free in {path} ({name}){takes}")


def _device(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.stat().st_dev
