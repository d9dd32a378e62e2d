"""Reading the kernel's account of a process's memory, this one's unless told otherwise. All figures in bytes."""

from __future__ import annotations

from pathlib import Path

_PROC = Path("/proc")
_SELF = _PROC / "self"


def status(pid: int | str = "self") -> dict[str, int]:
    """The sizes in ``/proc/<pid>/status``: VmHWM, VmRSS, RssAnon, RssFile …"""
    return _sizes((_PROC / str(pid) / "status").read_text(encoding="ascii", errors="replace"))


def rollup() -> dict[str, int]:
    """Anonymous and File (resident but not anonymous), by pages; by the lagging counters where a kernel lacks them."""
    try:
        sizes = _sizes((_SELF / "smaps_rollup").read_text(encoding="ascii"))
    except OSError:
        sizes = status()
        return {"Anonymous": sizes["RssAnon"], "File": sizes["VmRSS"] - sizes["RssAnon"]}
    return {"Anonymous": sizes["Anonymous"], "File": sizes["Rss"] - sizes["Anonymous"]}


def available() -> int:
    """Host memory that a process can still get without swapping (proc(5), ``MemAvailable``)."""
    return _sizes(Path("/proc/meminfo").read_text(encoding="ascii"))["MemAvailable"]


def libraries() -> int:
    """Resident pages of mapped libraries (``.so``), shared or not.

    They come in as code is first run, as many at a time as the page cache happens to hold: some 50 MiB more or less
    for CUDA's libraries, on the first load of a machine. They stay mapped, so what is resident at the end of a phase
    was resident at its peak.
    """
    total, counting = 0, False
    with (_SELF / "smaps").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024 if counting else 0
            elif not line[0].isupper():
                # The header of a mapping: address, permissions, offset, device, inode, path.
                counting = ".so" in line.rpartition("/")[2]
    return total


def shared_out(pid: int) -> int:
    """Anonymous memory of a process, with what it shares with forks of itself counted in parts: sums are right."""
    try:
        sizes = _sizes((_PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii"))
    except PermissionError:
        return status(pid)["RssAnon"]
    # Before Linux 5.9 the parts were not told by kind.
    return sizes.get("Pss_Anon", sizes.get("Anonymous", 0))


def reset_peak() -> str:
    """Set VmHWM to what is resident now (proc(5), ``clear_refs``). Empty, or why the kernel refused."""
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
