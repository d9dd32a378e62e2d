"""A model of torch's caching allocator for one GPU: the same blocks, splits and segments, without the memory.

It follows ``c10/cuda/CUDACachingAllocator.cpp`` as it is configured by default: no expandable segments, no rounding to
powers of two, no limit for splitting. All work is on one stream, so a block is free as soon as it is released.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, field

#: ``kMinBlockSize``: every size is rounded up to a multiple.
MIN_BLOCK = 512
#: ``kSmallSize``: the largest size that the pool of small blocks serves.
SMALL_SIZE = 1 << 20
#: ``kSmallBuffer``: a segment of the small pool.
SMALL_SEGMENT = 2 << 20
#: ``kLargeBuffer``: a segment for sizes below ``MIN_LARGE_ALLOC``.
LARGE_SEGMENT = 20 << 20
#: ``kMinLargeAlloc``: from this size on, a segment is as large as the request …
MIN_LARGE_ALLOC = 10 << 20
#: ``kRoundLarge``: … rounded up to a multiple of this size.
ROUND_LARGE = 2 << 20


class PredictedOutOfMemory(RuntimeError):
    """The device of the prediction does not have enough memory."""


@dataclass(eq=False)
class Block:
    """A range of a segment, in use or free."""

    address: int
    size: int
    small: bool
    requested: int = 0
    in_use: bool = False
    prev: Block | None = field(default=None, repr=False)
    next: Block | None = field(default=None, repr=False)

    @property
    def order(self) -> tuple[int, int]:
        """Return the sort key among the free blocks of a pool: the smallest block first, then the lowest address."""
        return self.size, self.address


def round_size(size: int) -> int:
    """Return the size of the block that serves a request."""
    return max(MIN_BLOCK, -(-size // MIN_BLOCK) * MIN_BLOCK)


def segment_size(size: int) -> int:
    """Return the bytes requested from the driver if no free block serves a request of a rounded size."""
    if size <= SMALL_SIZE:
        return SMALL_SEGMENT
    if size < MIN_LARGE_ALLOC:
        return LARGE_SEGMENT
    return -(-size // ROUND_LARGE) * ROUND_LARGE


class CachingAllocator:
    """Blocks, segments and the counters of ``torch.cuda.memory_stats``, in bytes.

    Args:
        capacity: Bytes that all segments together may take: the device's memory without the context.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        #: Free blocks by size and address; True for the small pool.
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._blocks: dict[int, Block] = {}
        # cudaMalloc's real addresses are unknown. Here they rise, 2 MiB apart, so that segments never touch.
        self._next_address = 1 << 45
        self.allocated = self.reserved = 0
        self.allocated_peak = self.reserved_peak = 0
        #: Requested bytes (before rounding) and the number of requests, since the start.
        self.ever_requested = self.ever_count = 0
        self.requested = 0
        self.retries = 0
        #: Size of segment -> how many there are.
        self.segments: Counter[int] = Counter()

    def malloc(self, requested: int) -> int:
        """Return the address of a block for ``requested`` bytes. Raises PredictedOutOfMemory if they do not fit."""
        size = round_size(requested)
        small = size <= SMALL_SIZE
        block = self._best_fit(size, small) or self._segment(size, small)
        self._split(block, size)
        block.in_use, block.requested = True, requested
        self.allocated += block.size
        self.allocated_peak = max(self.allocated_peak, self.allocated)
        self.requested += requested
        self.ever_requested += requested
        self.ever_count += 1
        return block.address

    def free(self, address: int) -> None:
        """Release the block at an address; it is merged with its free neighbours."""
        block = self._blocks[address]
        block.in_use = False
        self.allocated -= block.size
        self.requested -= block.requested
        for neighbour in (block.prev, block.next):
            if neighbour is not None and not neighbour.in_use:
                self._forget(neighbour)
                block = self._merged(block, neighbour)
        insort(self._free[block.small], block.order)

    def size_of(self, address: int) -> int:
        """Return the size of the block at an address."""
        return self._blocks[address].size

    def reset_peaks(self) -> None:
        """Reset the peaks to the current figures, as ``torch.cuda.reset_peak_memory_stats`` does."""
        self.allocated_peak, self.reserved_peak = self.allocated, self.reserved

    def empty_cache(self) -> int:
        """Give every segment without a block in use back to the driver; return their bytes."""
        before = self.reserved
        for small in (True, False):
            for _, address in list(self._free[small]):
                block = self._blocks[address]
                if block.prev is None and block.next is None:
                    self._forget(block)
                    self.reserved -= block.size
                    self.segments[block.size] -= 1
        return before - self.reserved

    def _best_fit(self, size: int, small: bool) -> Block | None:
        free = self._free[small]
        place = bisect_left(free, (size, 0))
        return self._blocks[free.pop(place)[1]] if place < len(free) else None

    def _segment(self, size: int, small: bool) -> Block:
        wanted = segment_size(size)
        if self.reserved + wanted > self.capacity:
            self.retries += 1
            self.empty_cache()
        if self.reserved + wanted > self.capacity:
            raise PredictedOutOfMemory(
                f"CUDA out of memory (predicted): {wanted} bytes requested, {self.allocated} allocated, "
                f"{self.reserved} reserved of {self.capacity}"
            )
        block = self._blocks[self._next_address] = Block(self._next_address, wanted, small)
        self._next_address += wanted + ROUND_LARGE
        self.reserved += wanted
        self.reserved_peak = max(self.reserved_peak, self.reserved)
        self.segments[wanted] += 1
        return block

    def _split(self, block: Block, size: int) -> None:
        rest = block.size - size
        if not (rest >= MIN_BLOCK if block.small else rest > SMALL_SIZE):
            return
        remaining = Block(block.address + size, rest, block.small, prev=block, next=block.next)
        if block.next is not None:
            block.next.prev = remaining
        block.next, block.size = remaining, size
        self._blocks[remaining.address] = remaining
        insort(self._free[block.small], remaining.order)

    def _merged(self, block: Block, neighbour: Block) -> Block:
        first, second = (neighbour, block) if neighbour is block.prev else (block, neighbour)
        first.size += second.size
        first.next = second.next
        if second.next is not None:
            second.next.prev = first
        del self._blocks[second.address]
        first.in_use = False
        return first

    def _forget(self, block: Block) -> None:
        """Remove a block from the list of free ones, also when its whole segment goes back to the driver."""
        free = self._free[block.small]
        del free[bisect_left(free, block.order)]
        if block.prev is None and block.next is None:
            del self._blocks[block.address]
