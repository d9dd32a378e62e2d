"""Import the modules that loads need into the server, without initialising CUDA.

Importing torch and transformers takes longer than most loads, and a fork of a process that has imported them takes
milliseconds. CUDA works in the child as long as the parent has not touched it. bitsandbytes, and peft, which imports
it, ask torch for the GPU while they are imported; the answers come from what the pytest process knows from NVML.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from pytest_llmload.core.libraries import is_installed
from pytest_llmload.process import environment
from pytest_llmload.process.load_imports import fill_caches
from pytest_llmload.system import garbage


def import_all(modules: Sequence[str], cuda: dict[str, Any] | None) -> None:
    """Import the modules that are installed.

    ``cuda`` has torch's answers about GPUs meanwhile: ``count`` and ``capability``; None leaves torch unchanged, which
    need not be installed.
    """
    asking = answering(cuda) if cuda is not None and is_installed("torch") else contextlib.nullcontext()
    with garbage.collected_rarely(), asking:
        for name in modules:
            if name not in sys.modules and not is_installed(name):
                continue
            importlib.import_module(name)
        if "transformers" in sys.modules:
            fill_caches()
            environment.parse_versions()


@contextlib.contextmanager
def answering(cuda: dict[str, Any]) -> Iterator[None]:
    """Answer for ``torch.cuda`` with the values of ``count`` and ``capability`` while the context is open."""
    import torch

    answers: dict[str, Any] = {
        "is_available": lambda: cuda["count"] > 0,
        "device_count": lambda: cuda["count"],
        "get_device_capability": lambda device=None: tuple(cuda["capability"]),
    }
    saved = {name: getattr(torch.cuda, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(torch.cuda, name, answer)
        yield
    finally:
        for name, function in saved.items():
            setattr(torch.cuda, name, function)
