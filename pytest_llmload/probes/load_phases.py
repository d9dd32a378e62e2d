"""The seconds of the loading call, by part: reading, converting, moving, and the rest.

A thread samples the stacks of the load's threads every few milliseconds, and finds in each the innermost function that
the table below contains. No library code is replaced, so that a function that a later release renames breaks nothing:
its seconds count for the function that calls it, and mostly as ``other``.

Some work cannot be separated, and is counted together:

- Files of safetensors are mapped: no byte is read before it is used. The copy to the device reads them, so that
  ``read`` includes that copy and a cast on the way. If nothing is copied before a weight is quantised or merged with
  others, ``convert`` includes the reading; and a dense load to the CPU does not read weights at all.
- A function of C has no frame: what the user's own loader calls directly (``tensor.to``, ``safe_open``) counts as the
  loader's own time, which is ``other``.
- A GPU runs its kernels asynchronously: their seconds count where the host waits for them.
- ``Module.to`` is a move, even if it casts.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from functools import cache
from time import perf_counter
from types import FrameType

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import SAMPLED_PARTS, LoadResult
from pytest_llmload.probes.load_sampler import LoadSampler
from pytest_llmload.quantisation.registry import methods

#: Seconds between two samples. One costs the load about 0.1 ms.
INTERVAL = 0.01
#: Fewest samples of a usable result: even with so many, a half of the time may show as a third of it or as two thirds.
ENOUGH = 20

READ, CONVERT, MOVE, OTHER = SAMPLED_PARTS
_WAITS = "waits"

#: Module or package, its functions (empty: all), phase. The first row that fits a function counts. Functions are given
#: by name, or by their qualified name where Python tells it (3.11).
TABLE: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("safetensors.torch", ("load_file", "load_model", "load"), READ),
    ("torch.serialization", ("load",), READ),
    ("torch.nn.modules.module", ("Module.load_state_dict", "load_state_dict"), READ),
    # Slices of mapped files are copied to the device; each rank copies its own part.
    ("transformers.core_model_loading", ("_materialize_copy",), READ),
    ("transformers.distributed.sharding_utils", ("shard_tensor",), READ),
    ("transformers.modeling_utils", ("load_state_dict", "_load_state_dict_into_meta_model"), READ),
    ("transformers.integrations.tensor_parallel", ("shard_and_distribute_module",), READ),
    ("accelerate.utils.modeling", ("load_state_dict",), READ),
    # Waits for the reading threads and renames weights; its conversions have frames of their own.
    ("transformers.core_model_loading", ("WeightRenaming.convert", "materialize_tensors"), OTHER),
    ("transformers", ("convert",), CONVERT),
    ("transformers.quantizers", ("create_quantized_param", "postprocess_model"), CONVERT),
    *((module, functions, f"load.{phase}") for method in methods() for module, functions, phase in method.phases),
    ("torch.nn.modules.module", ("half", "bfloat16", "float", "double", "type"), CONVERT),
    ("torch.nn.modules.module", ("to", "cuda", "cpu"), MOVE),
    ("transformers.integrations.accelerate", ("accelerate_dispatch", "offload_weight"), MOVE),
    ("accelerate.big_modeling", ("dispatch_model", "cpu_offload", "disk_offload"), MOVE),
    ("accelerate.hooks", (), MOVE),
    ("accelerate.utils.offload", (), MOVE),
    ("accelerate.utils.modeling", ("set_module_tensor_to_device",), MOVE),
    # These move each device's part of the weights.
    ("deepspeed.module_inject", (), MOVE),
    ("pytest_llmload.worker.parallel.sharded_model", ("shard",), MOVE),
    ("threading", ("wait", "_wait_for_tstate_lock", "join"), _WAITS),
    ("concurrent.futures.thread", ("_worker",), _WAITS),
)


class LoadPhases(LoadSampler):
    """Fills ``phases`` with ``load.read``, ``load.convert``, ``load.move`` and ``load.other``, in seconds.

    They add up to the time of the loading call, without what a strategy does to the loaded model (an adapter), which is
    timed separately. A load that is too short for :data:`ENOUGH` samples has no such phases. For a load that raised,
    they cover the time up to the error.
    """

    thread_name = "load phases"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._loading_thread = 0
        self._begin = self._end = 0.0
        self._seconds: dict[str, float] = defaultdict(float)
        self._looks = 0

    def loading(self) -> None:
        self._loading_thread = threading.get_ident()
        self._begin = perf_counter()
        self.begun.set()

    def returned(self) -> None:
        self._end = perf_counter()
        self.ended.set()

    def close(self) -> None:
        if self._begin and not self._end:
            self.returned()
        super().close()

    def fill(self, result: LoadResult) -> None:
        self.close()
        result.phase_samples = self._looks
        if self._looks < ENOUGH:
            return
        span, watched = self._end - self._begin, sum(self._seconds.values())
        result.phases |= {phase: span * self._seconds[phase] / watched for phase in SAMPLED_PARTS}

    def sample(self) -> None:
        self.begun.wait()
        last = self._begin
        while not self.ended.wait(INTERVAL):
            phases = _phases(self._loading_thread)
            now = perf_counter()
            # The time counts for what is seen now: a function that held the interpreter is seen when it releases it.
            for phase in phases:
                self._seconds[phase] += (now - last) / len(phases)
            self._looks += 1
            last = now


def _phases(loading_thread: int) -> list[str]:
    """Return the current phase of the load's own thread; if that thread waits, those of the other threads."""
    frames = sys._current_frames()
    # This function's own frame would refer to itself, and keep alive the tensors in the load's frames.
    del frames[threading.get_ident()]
    own = phase_of(frames.get(loading_thread))
    if own != _WAITS:
        return [own]
    others = (phase_of(frame) for thread, frame in frames.items() if thread != loading_thread)
    return [phase for phase in others if phase not in (_WAITS, OTHER)] or [OTHER]


def phase_of(frame: FrameType | None) -> str:
    """Return the phase of the innermost function of a stack that is in the table; ``load.other`` if none is."""
    while frame is not None:
        code = frame.f_code
        phase = _phase(frame.f_globals.get("__name__"), code.co_name, getattr(code, "co_qualname", ""))
        if phase:
            return phase
        frame = frame.f_back
    return OTHER


@cache
def _phase(module: object, name: str, qualified: str) -> str:
    if name == "<module>":
        # The module is being imported.
        return OTHER
    return next(
        (
            phase
            for place, functions, phase in TABLE
            if f"{module}.".startswith(f"{place}.") and (not functions or name in functions or qualified in functions)
        ),
        "",
    )
