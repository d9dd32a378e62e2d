"""The C library's allocator during a load, and the pages of a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

import pytest

from pytest_llmload.system import allocator

_BLOCKS = """
import ctypes
from pytest_llmload.system import allocator

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usm fsm uord ford keep".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def mapped():
    # A free place that the interpreter left in the heap may take some of them.
    before = libc.mallinfo2().hblks
    for _ in range(64):
        libc.malloc(100 << 10)
    return libc.mallinfo2().hblks - before

def freed():
    # 64 MiB below a block that is still used: the heap keeps them.
    blocks = [libc.malloc(1 << 20) for _ in range(65)]
    for block in blocks:
        ctypes.memset(block, 1, 1 << 20)
    for block in blocks[:-1]:
        libc.free(block)

"""


_PINNED = """
stands = allocator.pin()
pinned = mapped()
allocator.unpin()
print(stands, pinned, mapped())
"""


_TRIMMED = """
from pytest_llmload.system.proc import rollup
allocator.unpin()
freed()
before = rollup()["Anonymous"]
allocator.trim()
print(allocator.setting(), before >> 20, rollup()["Anonymous"] >> 20)
"""


_FORWARD = """
from pytest_llmload.probes.host_memory import HostMemory
probe = HostMemory(None)
probe.start()
probe.mark()
probe.loaded(None)
probe.forwarding()
freed()
probe.forwarded(None)
probe.close()
settled = probe.settled["Anonymous"] - probe.base["Anonymous"]
print(probe.malloc, probe.peaks["forward"] >> 20, settled >> 20)
"""


#: A fork for each moment: the probe's module imports torch.
_PROBED = """
import os, sys
from pytest_llmload.probes.host_memory import HostMemory
for moment in sys.argv[1:]:
    if os.fork() == 0:
        probe = HostMemory(None)
        probe.start()
        probe.mark()
        pinned = mapped()
        eval(f"probe.{moment}")
        print(probe.malloc, pinned, mapped(), flush=True)
        probe.close()
        os._exit(0)
    assert os.wait()[1] == 0
"""
_MOMENTS = ("loaded(None)", "forwarding()", "forwarded(None)", "generating()", "generated(None)", "close()")


def blocks(program: str, tuned: dict[str, str], *arguments: str) -> list[tuple[str, int, int]]:
    """How the allocator stands, and the two numbers that the program prints after it, of each of its lines."""
    env = {name: value for name, value in os.environ.items() if name not in allocator.USERS} | tuned
    command = [sys.executable, "-c", _BLOCKS + program, *arguments]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found = [line.rsplit(maxsplit=2) for line in run.stdout.splitlines()]
    return [(said, int(pinned), int(after)) for said, pinned, after in found]


@cache
def probed() -> dict[str, tuple[str, int, int]]:
    """How the allocator stands before and after each moment of a load."""
    return dict(zip(_MOMENTS, blocks(_PROBED, {}, *_MOMENTS), strict=True))


@pytest.mark.parametrize(
    ("tuned", "stands", "let_go"),
    [
        ({}, "mmap_threshold=65536", False),
        ({"MALLOC_MMAP_THRESHOLD_": "4096"}, "by MALLOC_MMAP_THRESHOLD_", True),
    ],
)
def test_the_allocator_is_pinned_and_left_alone_again(tuned: dict[str, str], stands: str, let_go: bool) -> None:
    [(said, pinned, after)] = blocks(_PINNED, tuned)
    assert said == stands
    assert pinned >= 48
    assert (after >= 48) == let_go


@pytest.mark.parametrize(
    ("tuned", "given_back"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "1000000000"}, False)], ids=["ours", "user's"]
)
def test_what_the_heap_keeps_of_freed_blocks_is_given_back(tuned: dict[str, str], given_back: bool) -> None:
    [(_, before, after)] = blocks(_TRIMMED, tuned)
    assert (before - after >= 60) == given_back


def test_what_the_heap_keeps_of_a_forward_is_in_its_peak_and_not_in_what_is_settled() -> None:
    [(_, peak, settled)] = blocks(_FORWARD, {})
    assert peak >= 64
    assert settled <= 4


def test_the_allocator_stays_pinned_for_every_figure_of_memory() -> None:
    """Else temporaries come from a heap that fragments differently in each process, and clean loads are called red."""
    for moment in ("loaded(None)", "forwarding()", "forwarded(None)", "generating()"):
        _, pinned, after = probed()[moment]
        assert pinned >= 48, moment
        assert after >= 48, moment


@pytest.mark.parametrize("end", ["generated(None)", "close()"])
def test_the_allocator_is_let_go_when_the_load_ends_however_it_does(end: str) -> None:
    """Else what is run on the model afterwards would be slower than without us."""
    said, pinned, after = probed()[end]
    assert said == "mmap_threshold=65536"
    assert pinned >= 48
    assert after == 0


@pytest.mark.parametrize("own", [True, False])
def test_a_fork_that_owns_its_pages_copies_none_while_it_is_timed(own: bool) -> None:
    """Page faults, which no clock blurs, of 16 MiB that the parent has written and the child writes again."""
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            f"""
import os, resource
from pytest_llmload.system import process
block = bytearray(b"1") * (16 << 20)
if os.fork() == 0:
    assert process.own_pages() if {own} else True
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block[::4096] = b"2" * (len(block) // 4096)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
    os._exit(0)
os.wait()
""",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    assert (int(told.stdout) < 100) == own
