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
from pytest_llmload.prediction.dispatch import FakeDevice
from pytest_llmload.prediction.fake_cuda import replaced
from pytest_llmload.prediction.files import fake_safe_open
from pytest_llmload.prediction.kernels import Kernels
from pytest_llmload.prediction.tensor_methods import storage_methods, tensor_methods
from pytest_llmload.prediction.tracing import Tracing
from pytest_llmload.quantisation.registry import methods


@contextlib.contextmanager
def predicted_process(tracing: Tracing, version: str) -> Iterator[None]:
    """Give this process the predicted GPUs, of CUDA's release ``version``, while the context is open."""
    kernels = Kernels(tracing)
    mode = FakeDevice(
        tracing.registry, kernels.handlers(), tracing.cuda.current_device, tracing.record.operator_runs, tracing.refuse
    )
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        try:
            for method in methods():
                enter(method.predicted())
        except NotImplementedError as error:
            raise tracing.refuse(str(error)) from error
        _forget_answers()
        stack.callback(_forget_answers)
        enter(replaced(torch.cuda, tracing.cuda.functions()))
        if hasattr(torch, "accelerator"):
            enter(replaced(torch.accelerator, tracing.cuda.accelerator_functions()))
        enter(replaced(torch.version, {"cuda": version}))
        enter(replaced(torch, {"device": device_numbers.NumberedDevice, **device_numbers.constructors()}))
        enter(replaced(torch._C._nn, {"_parse_to": device_numbers.parse_to}))
        enter(replaced(torch.Tensor, tensor_methods(mode) | device_numbers.methods()))
        enter(replaced(torch.UntypedStorage, storage_methods(tracing.registry)))
        enter(replaced(torch.nn.functional, kernels.functions()))
        enter(replaced(concurrent.futures.ThreadPoolExecutor, {"submit": _run_at_once}))
        enter(_everywhere("safe_open", fake_safe_open(tracing.registry)))
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        enter(mode)
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
