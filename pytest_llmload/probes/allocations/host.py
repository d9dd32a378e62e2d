"""Record the allocations of host memory: torch's, and Python's with numpy's."""

from __future__ import annotations

import gc
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pytest_llmload.probes.allocations.sites import Frame, site, stack
from pytest_llmload.probes.allocations.timeline import HeldBlock, Timeline
from pytest_llmload.probes.holders import holders

#: Bytes of the smallest block that is recorded; a load has very many smaller ones.
LEAST = 16 << 10
#: Fewest bytes, allocated on one line by Python and numpy, that are reported.
_WORTH = 64 << 10
#: Objects whose references are asked for at once. tracemalloc records each answer: one for each of half a million
#: objects took 7 s.
_AT_ONCE = 10_000
#: Frames that tracemalloc keeps of each allocation, and the bytes that its peak must grow by for another snapshot.
_FRAMES, _STEP = 16, 4 << 20
#: The tracemalloc domain of numpy's allocations (numpy.lib.tracemalloc_domain).
_NUMPY = 389047
#: Files whose own memory is not reported.
_OWN = (__file__, tracemalloc.__file__)
#: Seconds between two samples of the memory that Python and numpy hold.
_PERIOD = 0.002


class TorchRecorder:
    """Records every storage that an operator returns, in each thread that starts during the recording.

    ``TorchDispatchMode`` sees the operators of one thread, and transformers loads in the threads of a pool. A storage
    is released when its last tensor is, which a weak reference reports.
    """

    def __init__(self) -> None:
        self.timeline = Timeline()
        self._run = threading.Thread.run
        self._mode: TorchDispatchMode | None = None
        self._known: dict[int, weakref.ref[Any]] = {}

    def start(self) -> None:
        """Begin to record, in this thread and in those that start from now on."""
        recorder, run = self, self._run

        def recorded(thread: threading.Thread) -> None:
            with _Mode(recorder.saw):
                run(thread)

        threading.Thread.run = recorded  # type: ignore[method-assign,assignment]
        self._mode = _Mode(self.saw)
        self._mode.__enter__()

    def stop(self) -> None:
        """Stop recording. May be called twice."""
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            threading.Thread.run = self._run  # type: ignore[method-assign]
            self._mode = None

    def saw(self, given: Any) -> None:
        """Record the new storages among what an operator returned."""
        if self._mode is None:
            # A thread of a pool may outlive the recording.
            return
        for tensor in tree_leaves(given):
            if not issubclass(type(tensor), torch.Tensor) or tensor.device.type != "cpu":
                continue
            if tensor.layout != torch.strided or type(tensor).__name__ == "FakeTensor":
                continue
            storage = tensor.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            if size < LEAST or address in self._known:
                continue
            self._known[address] = weakref.ref(storage, partial(self._released, address))
            self.timeline.allocated(address, HeldBlock(size, site(stack(sys._getframe(2)))))

    def _released(self, address: int, _: object) -> None:
        del self._known[address]
        self.timeline.released(address)


class _Mode(TorchDispatchMode):  # type: ignore[misc]
    def __init__(self, saw: Callable[[Any], None]) -> None:
        super().__init__()
        self._saw = saw

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        self._saw(given)
        return given


class PythonRecorder:
    """Records what Python and numpy hold at their peak and at the end, by tracemalloc; a thread finds the peak."""

    def __init__(self) -> None:
        self.peak: list[HeldBlock] = []
        self.kept: list[HeldBlock] = []
        #: Line that allocated arrays that are still alive -> what holds one of them.
        self.holders: dict[str, str] = {}
        self._highest = _STEP
        self._peak: tracemalloc.Snapshot | None = None
        self._over = threading.Event()
        # tracemalloc knows its highest total, but not which lines held it then.
        self._thread = threading.Thread(target=self._look, name="llmload-allocations", daemon=True)
        self._is_ours = not tracemalloc.is_tracing()

    def start(self) -> None:
        """Begin to record; if the user's code is tracing already, its recording is used."""
        if self._is_ours:
            tracemalloc.start(_FRAMES)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(_PERIOD):
            held = tracemalloc.get_traced_memory()[0]
            if held > self._highest + _STEP:
                self._peak = tracemalloc.take_snapshot()
                self._highest = held

    def stop(self) -> None:
        """Stop recording. May be called twice, and also if recording was never started."""
        if self._over.is_set() or not self._thread.is_alive():
            return
        self._over.set()
        self._thread.join()
        snapshot = tracemalloc.take_snapshot()
        self.kept = _large(snapshot)
        if self.kept:
            arrays = snapshot.filter_traces((tracemalloc.DomainFilter(True, _NUMPY),))
            self.holders = _array_holders({block.site for block in _large(arrays)})
        if self._is_ours:
            tracemalloc.stop()
        kept = {block.site for block in self.kept}
        # Memory that stays is reported once, as kept.
        self.peak = [block for block in _large(self._peak) if block.site not in kept] if self._peak else []


def _large(snapshot: tracemalloc.Snapshot) -> list[HeldBlock]:
    """Return the blocks of a snapshot whose line holds at least ``_WORTH`` bytes.

    Blocks of this module and of tracemalloc are left out after they are grouped: filters of tracemalloc look at each
    block, and take a second for a small load's.
    """
    return [
        HeldBlock(found.size, _line(found.traceback))
        for found in snapshot.statistics("traceback")
        if found.size >= _WORTH and found.traceback[-1].filename not in _OWN
    ]


def _line(traceback: tracemalloc.Traceback) -> str:
    # tracemalloc lists the innermost call last, and does not know the functions' names.
    return site(Frame(each.filename, each.lineno, "") for each in reversed(traceback))


def _array_holders(sites: set[str]) -> dict[str, str]:
    """Return what holds the arrays that ``sites`` allocated, by site."""
    found: dict[str, str] = {}
    held: list[Any] = []
    # Going through all objects takes seconds.
    for array, container in _arrays() if sites else ():
        traceback = tracemalloc.get_object_traceback(array)
        line = _line(traceback) if traceback is not None else ""
        if line in sites and line not in found:
            found[line] = "" if container is None else "the dict "
            held.append(array if container is None else container)
    return {line: before + name for (line, before), name in zip(found.items(), holders(held), strict=True)}


def _arrays() -> list[tuple[Any, Any]]:
    """Return the large arrays of the process, each with the untracked dict that holds it, or None.

    The garbage collector lists neither arrays nor dicts that contain only such objects, so that the objects that refer
    to them are searched.
    """
    ndarray = sys.modules["numpy"].ndarray
    found: list[tuple[Any, Any]] = []
    owners = gc.get_objects()
    for begin in range(0, len(owners), _AT_ONCE):
        for item in gc.get_referents(*owners[begin : begin + _AT_ONCE]):
            kind = type(item)
            if kind is ndarray and item.nbytes >= LEAST:
                found.append((item, None))
            elif kind is dict and not gc.is_tracked(item):
                found += [(each, item) for each in item.values() if type(each) is ndarray and each.nbytes >= LEAST]
    return found
