"""A bounded series of samples over time. Imports nothing of ours: the helper of ``anon_sampler`` runs this text."""

from __future__ import annotations

#: The most points of a series.
POINTS = 256


class Series:
    """Samples over time in at most so many points, and their peak.

    A point is the time of its last sample, and the highest size since the point before it. When the series is full,
    each two points become one, and further points stand for twice as many samples.
    """

    def __init__(self, most: int = POINTS) -> None:
        self.points: list[tuple[float, int]] = []
        self.peak = 0
        self._most = most
        self._samples = 0
        #: Samples that one point stands for.
        self._each = 1

    def add(self, moment: float, size: int) -> None:
        """Add a sample: its time in seconds, which never decreases, and a size in bytes."""
        self.peak = max(self.peak, size)
        if self._samples % self._each:
            self.points[-1] = (moment, max(self.points[-1][1], size))
        else:
            if len(self.points) == self._most:
                pairs = zip(self.points[::2], self.points[1::2], strict=True)
                self.points = [(later, max(one, other)) for (_, one), (later, other) in pairs]
                self._each *= 2
            self.points.append((moment, size))
        self._samples += 1
