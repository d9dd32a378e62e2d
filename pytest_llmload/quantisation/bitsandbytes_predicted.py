"""bitsandbytes' own CUDA backend on fake tensors: its Python code allocates as it would, its C library does nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch


class _Library:
    """Stands in for the C library: every function accepts its pointers and writes nothing."""

    compiled_with_cuda = True

    def __init__(self) -> None:
        self._functions: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._functions.setdefault(name, _Function())


class _Function:
    def __call__(self, *_: Any) -> int:
        return 0


@contextlib.contextmanager
def allocating() -> Iterator[None]:
    """Register the CUDA kernels, and make bitsandbytes build its code tables again, as it does in a new process.

    Raises NotImplementedError if the installed release registers its kernels in a way that this code does not know.
    """
    _register()
    functional = sys.modules.get("bitsandbytes.functional")
    tables: dict[str, Any] = getattr(functional, "name2qmap", {})
    before = dict(tables)
    tables.clear()
    try:
        yield
    finally:
        tables.clear()
        tables.update(before)


def _register() -> None:
    """Make bitsandbytes register its CUDA kernels in this process, whose torch has no CUDA."""
    import bitsandbytes

    if "bitsandbytes.backends.cuda.ops" in sys.modules:
        return
    try:
        from bitsandbytes import cextension, functional

        library = _Library()
        for module in (cextension, functional):
            vars(module)["lib"] = library
        torch._C._cuda_getCurrentRawStream = lambda device: 0
        import bitsandbytes.backends.cuda.ops
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(
            f"bitsandbytes {bitsandbytes.__version__} has no CUDA kernels that can be traced: {error}"
        ) from error
