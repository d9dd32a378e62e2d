"""Peak of this process's anonymous memory, sampled from a helper process.

The kernel keeps a high-water mark for all resident memory, but not for its anonymous part. A sampling thread would
take the interpreter's lock from the load; a small process that reads ``/proc/<pid>/statm`` does not.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import subprocess
import sys

from pytest_llmload.probes import series

#: Milliseconds between two samples. A peak shorter than that can be missed.
PERIOD_MS = 5

#: Samples resident minus file and shared pages (proc(5), ``statm``: fields 2 and 3). It answers each ``?`` with the
#: peak and the series since the previous one. It is not a child of the load, since a loader may wait for all its
#: children. It ends on request or when the load has ended, and not only when its input closes: a child that the loader
#: forked may hold that open. Each load waits for its start, of which the import of ``os`` would be a millisecond and
#: its ordinary end another.
_PROGRAM = f"""{inspect.getsource(series)}
import posix, select, sys, time
if posix.fork():
    posix._exit(0)
page = posix.sysconf("SC_PAGESIZE")
statm = posix.open(f"/proc/{{sys.argv[1]}}/statm", posix.O_RDONLY)
poll = select.poll()
poll.register(0, select.POLLIN)
series = Series()
while True:
    try:
        fields = posix.pread(statm, 256, 0).split()
    except ProcessLookupError:
        break
    series.add(time.monotonic(), (int(fields[1]) - int(fields[2])) * page)
    if poll.poll({PERIOD_MS}):
        order = posix.read(0, 1)
        if order != b"?":
            break
        told = " ".join(f"{{moment:.4f}},{{size}}" for moment, size in series.points)
        posix.write(1, f"{{series.peak}} {{told}}\\n".encode())
        series = Series()
posix._exit(0)
"""


_END = b"."


class AnonSampler:
    """A helper process that samples from its construction on."""

    #: Times (``time.monotonic``) and bytes between the last two calls of ``take``.
    series: tuple[tuple[float, int], ...] = ()

    def __init__(self) -> None:
        # Isolated and without site-packages: it starts in milliseconds, and does not run the user's startup code.
        starter = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        assert starter.stdin is not None
        assert starter.stdout is not None
        assert starter.stderr is not None
        self._orders, self._answers, self._complaints = starter.stdin, starter.stdout, starter.stderr
        # The helper itself is a child of this process, which ends at once.
        starter.wait()

    def take(self) -> int | None:
        """Return the peak in bytes since the previous call; None if the helper has ended."""
        try:
            self._orders.write(b"?")
        except BrokenPipeError:
            return None
        peak, *points = self._answers.readline().decode().split() or [""]
        pairs = (point.split(",") for point in points)
        self.series = tuple((float(moment), int(size)) for moment, size in pairs)
        return int(peak) if peak else None

    def close(self) -> str:
        """End the helper; return the last line of its error output, empty if there was no error."""
        # It may have ended already, and have written the reason.
        with contextlib.suppress(BrokenPipeError):
            self._orders.write(_END)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        for stream in (self._orders, self._answers, self._complaints):
            stream.close()
        return lines[-1] if lines else ""
