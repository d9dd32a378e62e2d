"""The memory that a reduction on a GPU needs while several thread blocks work on one result.

It follows ``setReduceConfig`` in aten/src/ATen/native/cuda/Reduce.cuh for reductions of the innermost dimensions.
"""

from __future__ import annotations

_MAX_THREADS, _WARP, _VECTOR = 512, 32, 4
_MIN_VALUES, _MAX_VALUES = 16, 256


def scratch(inputs: int, outputs: int, element: int, processors: int, threads_per_processor: int) -> tuple[int, int]:
    """Return the bytes of a reduction's buffer and of its semaphores; zeros if a single block computes each result.

    Args:
        inputs: Number of contiguous elements that are reduced to one result.
        outputs: Number of results.
        element: Bytes of a partial result.
        processors: Number of the GPU's multiprocessors.
        threads_per_processor: Most threads that one multiprocessor can run.
    """
    width = inputs // _VECTOR if inputs > 128 and outputs == 1 else inputs
    widest, tallest = min(_power_below(width), _MAX_THREADS), min(_power_below(outputs), _MAX_THREADS)
    height = min(tallest, _MAX_THREADS // min(widest, _WARP))
    across = min(widest, _MAX_THREADS // height)
    step, rows = across, height
    splits_warps = -(-inputs // step) >= min(height * 16, _MAX_VALUES)
    if not splits_warps:
        return 0, 0
    step, rows = step * height, 1
    values, grid = -(-inputs // step), -(-outputs // rows)
    wanted = processors * (threads_per_processor // (across * height))
    if values < _MAX_VALUES or grid > wanted:
        return 0, 0
    blocks = max(min(-(-wanted // grid), -(-values // _MIN_VALUES)), -(-values // _MAX_VALUES))
    return (element * outputs * blocks, 4 * grid) if blocks > 1 else (0, 0)


def _power_below(number: int) -> int:
    return 1 << (max(number, 1).bit_length() - 1)
