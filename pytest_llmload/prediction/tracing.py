"""Turn this process into one with the predicted GPUs, and back."""

from __future__ import annotations

import concurrent.futures
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._meta_registrations

from pytest_llmload.prediction import device_numbers
from pytest_llmload.prediction.devices import Model
from pytest_llmload.prediction.dispatch import FakeDevice
from pytest_llmload.prediction.fake_cuda import FakeCuda, replaced
from pytest_llmload.prediction.fake_tensors import Registry, Untraceable
from pytest_llmload.prediction.files import fake_safe_open
from pytest_llmload.prediction.kernels import Kernels
from pytest_llmload.prediction.record import Record
from pytest_llmload.prediction.tensor_methods import storage_methods, tensor_methods
from pytest_llmload.quantisation.registry import methods


class Tracing:
    """The predicted GPUs of one prediction, and what its trace assumed."""

    def __init__(self, model: Model, count: int, cuda: str) -> None:
        self.cuda = FakeCuda(model, count)
        self.record = Record()
        #: Why the trace is incomplete; empty as long as it is complete.
        self.reason = ""
        #: The assumptions of the trace, each once (a dict keeps their order).
        self.assumed: dict[str, None] = {}
        self._version = cuda
        self.registry = Registry(self._malloc, self._free)
        self.kernels = Kernels(self)
        self.mode = FakeDevice(
            self.registry, self.kernels.handlers(), self.cuda.current_device, self.record.operator_runs, self.refuse
        )

    def refuse(self, reason: str) -> Untraceable:
        """Return the error for an operator that cannot be traced; keep the first one's reason."""
        self.reason = self.reason or reason
        return Untraceable(reason)

    def _malloc(self, index: int, nbytes: int) -> int:
        address = self.cuda.allocators[index].malloc(nbytes)
        self.record.allocated(index, address, nbytes)
        return address

    def _free(self, index: int, address: int) -> None:
        self.cuda.allocators[index].free(address)
        self.record.freed(index, address)

    def kept(self, index: int, nbytes: int) -> None:
        """Allocate a block of a GPU for the rest of the process, such as a library's workspace."""
        self._malloc(index, nbytes)

    def scratch(self, index: int, sizes: list[int]) -> None:
        """Allocate blocks of a GPU and release them, as a kernel does for its temporary memory."""
        for address in [self._malloc(index, size) for size in sizes]:
            self._free(index, address)

    def token_follows(self, logits: Any) -> None:
        """Assume that the likeliest token is an ordinary one; which one it is makes no difference to memory."""
        values = torch.zeros(tuple(logits.shape), dtype=logits.dtype)
        values[..., logits.shape[-1] // 2] = 1
        self.registry.learn(logits, values, limit=None)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Give this process the predicted GPUs while the context is open."""
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            try:
                for method in methods():
                    enter(method.predicted())
            except NotImplementedError as error:
                raise self.refuse(str(error)) from error
            _forget_answers()
            stack.callback(_forget_answers)
            enter(replaced(torch.cuda, self.cuda.functions()))
            if hasattr(torch, "accelerator"):
                enter(replaced(torch.accelerator, self.cuda.accelerator_functions()))
            enter(replaced(torch.version, {"cuda": self._version}))
            enter(replaced(torch, {"device": device_numbers.Device, **device_numbers.constructors()}))
            enter(replaced(torch._C._nn, {"_parse_to": device_numbers.parse_to}))
            enter(replaced(torch.Tensor, tensor_methods(self.mode) | device_numbers.methods()))
            enter(replaced(torch.UntypedStorage, storage_methods(self.registry)))
            enter(replaced(torch.nn.functional, self.kernels.functions()))
            enter(replaced(concurrent.futures.ThreadPoolExecutor, {"submit": _run_at_once}))
            enter(_everywhere("safe_open", fake_safe_open(self.registry)))
            lifted = torch._C._only_lift_cpu_tensors()
            torch._C._set_only_lift_cpu_tensors(True)
            stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
            enter(self.mode)
            yield


def _run_at_once(self: Any, task: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run a task of a thread pool when it is submitted, so that reading is as far ahead of converting as possible.

    How far the threads that read weights get ahead of the one that converts them is a race. This gives the most memory
    that can be in use at once, which is also what real loads reach if the files are in the page cache.
    """
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    try:
        future.set_result(task(*args, **kwargs))
    except Exception as error:  # noqa: BLE001 - future.result() raises it
        future.set_exception(error)
    return future


@contextlib.contextmanager
def _everywhere(name: str, value: Any) -> Iterator[None]:
    """Replace a function of safetensors in every module that has imported it, and in safetensors itself."""
    import safetensors

    real = getattr(safetensors, name)
    holders = [module for module in list(sys.modules.values()) if getattr(module, "__dict__", {}).get(name) is real]
    for module in holders:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is value:
                setattr(module, name, real)


def _forget_answers() -> None:
    """Clear the libraries' cached answers to which devices exist."""
    for name in ("transformers.utils.import_utils", "accelerate.utils.imports", "transformers.utils.generic"):
        for function in vars(sys.modules.get(name, object)).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()
