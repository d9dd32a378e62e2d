"""Read the kernel's figures of a process's memory, by default this process's. All figures are in bytes."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

_PROC = Path("/proc")
_SELF = _PROC / "self"
#: Bytes of a page's entry in ``pagemap`` (proc(5)), and its highest byte for a page that is not resident.
_PAGEMAP_ENTRY = 8
_ABSENT = bytes(range(0x80))
#: A mapping of a library: addresses, permissions, offset, device, inode, path.
_LIBRARY = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) [^/\n]*/.*\.so[^/\n]*$", re.MULTILINE)


def status(pid: int | str = "self") -> dict[str, int]:
    """Return the sizes in ``/proc/<pid>/status``: VmHWM, VmRSS, RssAnon, RssFile … in bytes."""
    return _sizes((_PROC / str(pid) / "status").read_text(encoding="ascii", errors="replace"))


def rollup() -> dict[str, int]:
    """Return ``Anonymous`` and ``File`` (resident but not anonymous) in bytes, counted by pages.

    A kernel without ``smaps_rollup`` gives its counters instead, which lag behind.
    """
    try:
        sizes = _sizes((_SELF / "smaps_rollup").read_text(encoding="ascii"))
    except OSError:
        sizes = status()
        return {"Anonymous": sizes["RssAnon"], "File": sizes["VmRSS"] - sizes["RssAnon"]}
    return {"Anonymous": sizes["Anonymous"], "File": sizes["Rss"] - sizes["Anonymous"]}


def available() -> int:
    """Return the bytes of host memory that a process can still get without swapping (proc(5), ``MemAvailable``)."""
    return _sizes(Path("/proc/meminfo").read_text(encoding="ascii"))["MemAvailable"]


def libraries() -> int:
    """Return the resident bytes of mapped libraries (``.so``). Raises OSError if the kernel does not show them.

    Their pages come in when code first runs, as many at a time as the page cache happens to hold: some 50 MiB more or
    less for CUDA's libraries, on the first load of a machine. They stay mapped, so what is resident at the end of a
    phase was resident at its peak. ``pagemap`` costs a quarter of ``smaps``, which walks the weights too.
    """
    size = os.sysconf("SC_PAGESIZE")
    resident = 0
    with (_SELF / "pagemap").open("rb", buffering=0) as pagemap:
        lines = [line for line in (_SELF / "maps").read_bytes().splitlines() if b".so" in line]
        for begin, end in _library_ranges(b"\n".join(lines)):
            pagemap.seek(begin // size * _PAGEMAP_ENTRY)
            entries = pagemap.read((end - begin) // size * _PAGEMAP_ENTRY)
            resident += len(entries[_PAGEMAP_ENTRY - 1 :: _PAGEMAP_ENTRY].translate(None, _ABSENT))
    return resident * size


@lru_cache(maxsize=1)
def _library_ranges(maps: bytes) -> list[tuple[int, int]]:
    """Return the addresses of mapped libraries, adjacent mappings as one: a library has four or five of them.

    ``maps`` are the lines of libraries, which rarely change between two calls.
    """
    ranges: list[tuple[int, int]] = []
    for found in _LIBRARY.finditer(maps):
        begin, end = int(found[1], 16), int(found[2], 16)
        if ranges and ranges[-1][1] == begin:
            begin = ranges.pop()[0]
        ranges.append((begin, end))
    return ranges


def shared_out(pid: int) -> int:
    """Return the bytes of a process's anonymous memory; pages shared with forks count in part, so sums are right."""
    try:
        sizes = _sizes((_PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii"))
    except PermissionError:
        return status(pid)["RssAnon"]
    # Before Linux 5.9, the parts are not divided by kind.
    return sizes.get("Pss_Anon", sizes.get("Anonymous", 0))


def read_from_files(pid: int) -> tuple[int, int]:
    """Return the bytes that a process has in memory of files that it maps, and those that it has read from files.

    A process that reads safetensors does one of both. Neither figure makes it wait. Raises OSError once it has ended.
    """
    resident = int((_PROC / str(pid) / "statm").read_text(encoding="ascii").split()[2]) * os.sysconf("SC_PAGESIZE")
    counts = (_PROC / str(pid) / "io").read_text(encoding="ascii").splitlines()
    return resident, max(int(line.split()[1]) for line in counts if line.startswith("rchar:"))


def reset_peak() -> str:
    """Set VmHWM to what is resident now (proc(5), ``clear_refs``). Return an empty text, or why the kernel refused."""
    try:
        (_SELF / "clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        return f"the kernel does not reset the peak of resident memory: {error}"
    return ""


def _sizes(text: str) -> dict[str, int]:
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found
