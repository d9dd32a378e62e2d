"""Peak of this process's anonymous memory, sampled from another process.

The kernel keeps a high-water mark for all resident memory, none for the anonymous part. A thread that samples would
take the interpreter's lock from the load; a small process that reads ``/proc/<pid>/statm`` does not.
"""

from __future__ import annotations

import os
import subprocess
import sys

#: Milliseconds between two samples. A transient shorter than that can be missed.
PERIOD_MS = 5

#: Resident minus file and shared pages (proc(5), ``statm``: fields 2 and 3). Ends with its parent: its input closes.
_PROGRAM = f"""
import os, select, sys
page, peak = os.sysconf("SC_PAGESIZE"), 0
statm = os.open(f"/proc/{{sys.argv[1]}}/statm", os.O_RDONLY)
poll = select.poll()
poll.register(0, select.POLLIN)
while True:
    fields = os.pread(statm, 256, 0).split()
    peak = max(peak, (int(fields[1]) - int(fields[2])) * page)
    if poll.poll({PERIOD_MS}):
        order = os.read(0, 1)
        if not order:
            break
        os.write(1, b"%d\\n" % peak)
        peak = 0
"""


class AnonSampler:
    """A helper process that samples from now on."""

    def __init__(self) -> None:
        # Isolated and without site-packages: it starts in milliseconds and nobody's startup code runs in it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )

    def take(self) -> int | None:
        """The peak in bytes since the last time it was taken; None where the helper has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(b"?")
        except BrokenPipeError:
            return None
        line = self._process.stdout.readline()
        return int(line) if line else None

    def close(self) -> str:
        """End the helper; what it complained about, empty where all went well."""
        _, errors = self._process.communicate()
        lines = errors.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""
