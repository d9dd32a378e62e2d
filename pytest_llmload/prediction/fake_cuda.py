"""``torch.cuda`` for GPUs that do not exist, answered from models of their allocators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pytest_llmload.prediction.allocator import CachingAllocator
from pytest_llmload.prediction.devices import GpuModel


@dataclass(frozen=True)
class Properties:
    """A GPU as ``torch.cuda.get_device_properties`` describes it."""

    name: str
    #: In bytes.
    total_memory: int
    major: int
    minor: int
    multi_processor_count: int
    uuid: str = ""
    warp_size: int = 32
    max_threads_per_multi_processor: int = 2048
    is_integrated: bool = False
    gcnArchName: str = ""


class FakeCuda:
    """The functions of ``torch.cuda`` that libraries call, for GPUs whose properties only are known."""

    def __init__(self, model: GpuModel, count: int) -> None:
        self.gpus = [Properties(model.name, model.total, *model.capability, model.processors)] * count
        self.allocators = [CachingAllocator(model.total - model.context) for _ in range(count)]
        self._current = 0

    def current_device(self) -> int:
        """Return the index of the current GPU."""
        return self._current

    def index(self, device: Any = None) -> int:
        """Return the index of a GPU, given as an index, a name or a ``torch.device``; None is the current one."""
        if device is None:
            return self._current
        if isinstance(device, int):
            return device if device >= 0 else self._current
        index = torch.device(device).index
        return self._current if index is None else index

    def set_device(self, device: Any) -> None:
        """Make a GPU, given as :meth:`index` takes it, the current one."""
        self._current = self.index(device)

    def exchange(self, device: int) -> int:
        """Make a GPU the current one, unless its index is negative; return the index of the previous one."""
        before = self._current
        if device >= 0:
            self._current = device
        return before

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        """Return what the model of a GPU's allocator holds, in bytes, by the names of ``torch.cuda.memory_stats``."""
        model = self.allocators[self.index(device)]
        return {
            "allocated_bytes.all.current": model.allocated,
            "allocated_bytes.all.peak": model.allocated_peak,
            "reserved_bytes.all.current": model.reserved,
            "reserved_bytes.all.peak": model.reserved_peak,
            "requested_bytes.all.allocated": model.ever_requested,
            "requested_bytes.all.current": model.requested,
            "allocation.all.allocated": model.ever_count,
            "num_alloc_retries": model.retries,
        }

    def functions(self) -> dict[str, Any]:
        """Return the replacements for functions of ``torch.cuda``, by name."""

        def stat(name: str) -> Any:
            return lambda device=None: self.memory_stats(device)[name]

        def mem_get_info(device: Any = None) -> tuple[int, int]:
            index = self.index(device)
            allocator = self.allocators[index]
            return allocator.capacity - allocator.reserved, self.gpus[index].total_memory

        def reset_peak_memory_stats(device: Any = None) -> None:
            self.allocators[self.index(device)].reset_peaks()

        def empty_cache() -> None:
            for model in self.allocators:
                model.empty_cache()

        def get_device_properties(device: Any = None) -> Properties:
            return self.gpus[self.index(device)]

        def get_device_capability(device: Any = None) -> tuple[int, int]:
            gpu = self.gpus[self.index(device)]
            return gpu.major, gpu.minor

        nothing = _nothing
        return {
            "_lazy_init": nothing,
            "init": nothing,
            "is_available": lambda: True,
            "device_count": lambda: len(self.gpus),
            "current_device": self.current_device,
            "set_device": self.set_device,
            "_exchange_device": self.exchange,
            "_maybe_exchange_device": self.exchange,
            "synchronize": nothing,
            "get_device_properties": get_device_properties,
            "get_device_name": lambda device=None: self.gpus[self.index(device)].name,
            "get_device_capability": get_device_capability,
            "is_bf16_supported": lambda including_emulation=True: self.gpus[self._current].major >= 8,
            "is_current_stream_capturing": lambda: False,
            "memory_stats": self.memory_stats,
            "memory_allocated": stat("allocated_bytes.all.current"),
            "max_memory_allocated": stat("allocated_bytes.all.peak"),
            "memory_reserved": stat("reserved_bytes.all.current"),
            "max_memory_reserved": stat("reserved_bytes.all.peak"),
            "mem_get_info": mem_get_info,
            "reset_peak_memory_stats": reset_peak_memory_stats,
            "empty_cache": empty_cache,
            "ipc_collect": nothing,
            "current_stream": lambda device=None: Stream(),
            "default_stream": lambda device=None: Stream(),
            "stream": lambda stream: contextlib.nullcontext(),
            "Stream": Stream,
            "Event": Stream,
        }

    def accelerator_functions(self) -> dict[str, Any]:
        """Return the replacements for functions of ``torch.accelerator``, by name."""
        return {
            "is_available": lambda: True,
            "device_count": lambda: len(self.gpus),
            "current_accelerator": lambda check_available=False: torch.device("cuda"),
            "current_device_index": self.current_device,
            "current_device_idx": self.current_device,
            "set_device_index": self.set_device,
            "synchronize": _nothing,
        }


def _nothing(*_: Any, **__: Any) -> None:
    """Return at once, in place of functions that wait for a GPU."""


class Stream:
    """The only stream, and an event on it; all its work is always finished."""

    cuda_stream = 0
    device = torch.device("cuda", 0)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Ignore the device and the priority, which make no difference to memory."""

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else Stream()

    synchronize = wait_stream = wait_event = record = wait = _nothing


@contextlib.contextmanager
def replaced(owner: Any, values: dict[str, Any]) -> Iterator[None]:
    """Replace attributes of a module or a class while the context is open; attributes that it lacks are left out."""
    own = vars(owner)
    before = {name: own[name] for name in values if name in own}
    inherited = [name for name in values if name not in own and hasattr(owner, name)]
    for name in (*before, *inherited):
        setattr(owner, name, values[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
        for name in inherited:
            delattr(owner, name)
