"""The state of the page cache, as the kernel reports it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_llmload.system.page_cache import page_cache

MIB = 1 << 20


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_page_cache_is_told_warm_from_cold(tmp_path: Path, share: float) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(4 * MIB))
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        told = page_cache(str(tmp_path))
        if told != "cold":
            pytest.skip("this file system does not drop pages")
        if share:
            os.pread(descriptor, 4 * MIB, 0)
            told = page_cache(str(tmp_path))
    finally:
        os.close(descriptor)
    assert told == ("warm" if share else "cold")


def test_the_page_cache_of_nothing_is_not_told(tmp_path: Path) -> None:
    assert page_cache(str(tmp_path)) == "uncontrolled"
