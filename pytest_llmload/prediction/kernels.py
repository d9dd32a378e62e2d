"""Memory that torch's CUDA kernels allocate beyond their results: lasting workspaces, and attention's own outputs.

The sizes are those of torch 2.11 and 2.13 (aten/src/ATen/cuda/CUDABlas.cpp, CublasHandlePool.cpp, and
native/transformers/cuda/sdp_utils.cpp). Temporary memory of reductions and scans, up to some KiB each, is left out.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from pytest_llmload.prediction import reductions
from pytest_llmload.prediction.fake_tensors import CPU
from pytest_llmload.prediction.tracing import Tracing
from pytest_llmload.quantisation.registry import methods

aten = torch.ops.aten

#: cuBLAS' own workspace, by major compute capability; ``CUBLAS_WORKSPACE_CONFIG`` overrides it.
_WORKSPACE = {9: 32 << 20, 10: 32 << 20}
_WORKSPACE_ELSE = 4096 * 1024 * 2 + 16 * 1024 * 8
#: cuBLASLt's workspace, for multiplications with a bias; ``CUBLASLT_WORKSPACE_SIZE`` in KiB overrides it.
_LT_WORKSPACE = 1 << 20
_HALVES = (torch.float16, torch.bfloat16)
#: Bytes that cuDNN's attention needs while it runs on several queries.
_CUDNN_SCRATCH = 256


#: Reductions, with the bytes of a partial result; 0 stands for the bytes of the type that sums are accumulated in.
_REDUCTIONS = {
    aten.mean.default: 0,
    aten.sum.default: 0,
    aten.sum.dim_IntList: 0,
    aten.mean.dim: 0,
    # A value and its index.
    aten.argmax.default: 16,
}


class Kernels:
    """Handlers of the operators whose kernels allocate more than their results."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._workspaces: set[tuple[str, int]] = set()

    def handlers(self) -> dict[Any, Any]:
        """Return the handlers by operator overload."""
        products = (aten.mm.default, aten.bmm.default, aten.baddbmm.default, aten.addmm.default)
        return {
            **dict.fromkeys(products, self._product),
            **dict.fromkeys(_REDUCTIONS, self._reduction),
            aten._local_scalar_dense.default: self._scalar,
            aten.scalar_tensor.default: self._written_number,
        }

    def functions(self) -> dict[str, Any]:
        """Return the replacements for functions of ``torch.nn.functional``, by name."""
        return {"scaled_dot_product_attention": self._attention}

    def _product(self, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
        device = mode.target(func, [arg for arg in args if isinstance(arg, torch.Tensor)], kwargs)
        if device is not None and device.type == "cuda":
            self._workspace("cublas", device.index, self._cublas_bytes)
            if func is aten.addmm.default and args[0].dim() == 1:
                self._workspace("cublaslt", device.index, self._lt_bytes)
        return mode.run(func, args, kwargs)

    def _reduction(self, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
        out = mode.run(func, args, kwargs)
        device = mode.registry.device_of(args[0])
        if device.type == "cuda" and args[0].is_contiguous() and _is_innermost(args):
            gpu = self._tracing.cuda.gpus[device.index]
            outputs = max(out.numel(), 1)
            sizes = reductions.scratch(
                args[0].numel() // outputs,
                outputs,
                _REDUCTIONS[func] or _partial_bytes(args[0].dtype),
                gpu.multi_processor_count,
                gpu.max_threads_per_multi_processor,
            )
            self._tracing.scratch(device.index, [size for size in sizes if size])
        return out

    def _workspace(self, library: str, index: int, size: Any) -> None:
        if (library, index) not in self._workspaces:
            self._workspaces.add((library, index))
            self._tracing.kept(index, size(index))

    def _cublas_bytes(self, index: int) -> int:
        config = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
        pairs = re.findall(r":(\d+):(\d+)", config)
        if pairs:
            return sum(int(size) * int(count) for size, count in pairs) * 1024
        return _WORKSPACE.get(self._tracing.cuda.gpus[index].major, _WORKSPACE_ELSE)

    def _lt_bytes(self, index: int) -> int:
        return int(os.environ.get("CUBLASLT_WORKSPACE_SIZE", _LT_WORKSPACE >> 10)) << 10

    def _scalar(self, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Answer a quantiser that a condition on activations does not hold, and note so (docs/prediction.md)."""
        (tensor,) = args
        if tensor.dtype == torch.bool and mode.registry.values_of(tensor) is None:
            declared = {name: text for method in methods() for name, text in method.assumptions.items()}
            assumed = [text for name, text in declared.items() if name in mode.inside]
            self._tracing.assumed |= dict.fromkeys(assumed)
            if assumed:
                return False
        return mode.run(func, args, kwargs)

    def _written_number(self, mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Handle ``tensor[0] = 7``: C++ code makes a tensor of the number on the operand's pretended device."""
        if str(kwargs.get("device")) == "meta":
            kwargs = {**kwargs, "device": CPU}
        return mode.run(func, args, kwargs)

    def _attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        registry = self._tracing.registry
        if registry.device_of(query).type != "cuda":
            return _REAL_ATTENTION(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value)):
            raise self._tracing.refuse("attention that keeps state for a backward pass is not modelled")
        major = self._tracing.cuda.gpus[registry.device_of(query).index].major
        fused = query.dim() == 4 and torch.backends.cuda.flash_sdp_enabled() and major >= 8
        if fused and query.dtype in _HALVES and query.shape[-1] <= 256:
            return self._fused(query, value, seeds=2, scratch=_CUDNN_SCRATCH if query.shape[-2] > 1 else 0)
        if fused and query.dtype == torch.float32:
            return self._fused(query, value, seeds=0, scratch=0)
        return self._by_matrices(query, key, value, attn_mask, is_causal, scale, enable_gqa)

    def _fused(self, query: Any, value: Any, seeds: int, scratch: int) -> Any:
        """Return the result of one fused kernel, laid out as batch x position x head, and allocate what it keeps.

        It keeps the seeds of a dropout, even though no dropout is used.
        """
        batch, heads, length, _ = query.shape
        width = value.shape[-1]
        out = query.new_empty((batch, length, heads, width)).transpose(1, 2)
        unused = [query.new_empty((), dtype=torch.int64) for _ in range(seeds)]
        if scratch:
            del query, value
            torch.empty(scratch, dtype=torch.uint8, device=out.device)
        del unused
        return out

    def _by_matrices(
        self, query: Any, key: Any, value: Any, mask: Any, causal: bool, scale: float | None, grouped: bool
    ) -> Any:
        """Return the result of ``_scaled_dot_product_attention_math``."""
        if grouped:
            key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
            value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
        factor = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
        scores = (query * factor) @ (key.transpose(-2, -1) * factor)
        if causal:
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if mask is not None:
            scores = scores + (mask if mask.is_floating_point() else torch.zeros_like(mask, dtype=query.dtype))
        return torch.softmax(scores, -1) @ value


def _is_innermost(args: Any) -> bool:
    """Return true if the dimensions that a reduction reduces are the last ones."""
    dims = args[1] if len(args) > 1 else None
    if dims is None:
        return True
    places = sorted(dim % args[0].dim() for dim in ([dims] if isinstance(dims, int) else dims))
    return not places or places == list(range(args[0].dim() - len(places), args[0].dim()))


def _partial_bytes(dtype: torch.dtype) -> int:
    return 4 if dtype in (*_HALVES, torch.float32) else 8


_REAL_ATTENTION = torch.nn.functional.scaled_dot_product_attention
