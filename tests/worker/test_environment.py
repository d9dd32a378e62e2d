"""The environment of a load: every entry is declared, and none is private."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from loads import job, measured

from pytest_llmload.core.environment_entries import ENTRIES
from pytest_llmload.process.environment import environment


def test_the_environment_holds_nothing_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4096")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    found = environment(job("tiny-llama"))
    assert found["malloc"] == "by MALLOC_MMAP_THRESHOLD_"
    assert found["allocator"] == "expandable_segments:True"
    assert "secret" not in str(found)
    assert str(Path.home()) not in str(found)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    assert environment(job("tiny-llama"))["malloc"] == "system"


#: Entries that only some loads have, and of whom they are.
ONLY_SOME = {
    "cuda": "torch for NVIDIA", "rocm": "torch for AMD", "gpu": "a GPU", "driver": "a GPU", "libc": "glibc",
    "bitsandbytes": "installed", "peft": "installed", "kernels": "imported", "flash_attn": "imported",
    "deepspeed": "its strategy", "tensor_parallel": "its strategy", "ranks": "parallel strategies",
    "server": "endpoints", "revision": "endpoints", "allocator": "set by the user",
}  # fmt: skip


def test_every_entry_of_the_environment_is_declared_and_every_declared_one_is_there() -> None:
    result = measured("tiny-llama", attn="eager")
    assert set(result.environment) <= set(ENTRIES)
    assert set(ENTRIES) - set(result.environment) <= set(ONLY_SOME)
    assert result.environment["attn"] == "eager"


@pytest.mark.parametrize("name", ["deepspeed", "tensor_parallel"])
def test_the_library_of_a_strategy_is_an_entry_of_its_loads_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_llmload.process.environment.version_of", lambda package: f"{package} 1.0")
    # The warm server has imported it for another load.
    monkeypatch.setitem(sys.modules, "tensor_parallel", ModuleType("tensor_parallel"))
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    assert name not in environment(job("tiny-llama"))
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert environment(job("tiny-llama", strategy=name, world_size=2))[name] == f"{name} 1.0"
