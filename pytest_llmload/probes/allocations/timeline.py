"""Allocations and releases in their order, and the blocks that were held at the peak."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class HeldBlock(NamedTuple):
    """A block of memory, and the line that allocated it."""

    bytes: int
    site: str


class Timeline:
    """The allocations and releases since a moment; blocks are identified by their addresses."""

    def __init__(self) -> None:
        #: Address and block of an allocation; address and None of a release.
        self._events: list[tuple[int, HeldBlock | None]] = []

    def allocated(self, address: int, block: HeldBlock) -> None:
        """Note an allocation."""
        self._events.append((address, block))

    def released(self, address: int) -> None:
        """Note the release of the block at an address."""
        self._events.append((address, None))

    def at_peak(self) -> dict[int, HeldBlock]:
        """Return the blocks that were held when their sum was highest, by address."""
        peak = self._played()[1]
        return self._played(peak)[0]

    def at_end(self) -> dict[int, HeldBlock]:
        """Return the blocks that were never released, by address."""
        return self._played()[0]

    def _played(self, until: int | None = None) -> tuple[dict[int, HeldBlock], int]:
        """Return the blocks held after the first ``until`` events, and the number of events at the peak."""
        held: dict[int, HeldBlock] = {}
        total = highest = peak = 0
        for number, (address, block) in enumerate(list(self._events)[:until], start=1):
            before = held.pop(address, None)
            total -= before.bytes if before is not None else 0
            if block is not None:
                held[address] = block
                total += block.bytes
            if total > highest:
                highest, peak = total, number
        return held, peak


def by_site(blocks: Iterable[HeldBlock], most: int, least: int) -> Mapping[str, int]:
    """Return the ``most`` sites with the most bytes, largest first; those under ``least`` bytes are left out."""
    sums: dict[str, int] = defaultdict(int)
    for block in blocks:
        sums[block.site] += block.bytes
    ordered = sorted(sums.items(), key=lambda item: (-item[1], item[0]))
    return {name: size for name, size in ordered[:most] if size >= least}
