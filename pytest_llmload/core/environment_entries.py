"""What a load's figures depend on besides the model: the entries of its environment, declared once.

The load's process fills them, a baseline keeps those that are ``stored``, and comparing names what differs.
"""

from __future__ import annotations

from dataclasses import dataclass

#: The kind of host. It belongs to each time, not to the file: times of several hosts stand in one file.
HOST = "host"

VERSION = "version"
MACHINE = "machine"
SETTING = "setting"

#: When the version of a library is an entry: it is installed; this process has imported it; a strategy of the load
#: needs it, where the warm server may have imported it for another load.
INSTALLED = "installed"
IMPORTED = "imported"
NEEDED = "needed"

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Entry:
    """One entry of an environment."""

    name: str
    kind: str
    #: Of a library, when it is there; ``name`` is what it is imported as. Empty for anything else.
    present: str = ""
    #: Whether a baseline file keeps it.
    stored: bool = True
    #: What it means that an environment does not have it; ``unknown`` is equal to every value.
    absent: str = UNKNOWN


ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        *(
            Entry(name, VERSION, INSTALLED, absent="not installed")
            for name in ("accelerate", "bitsandbytes", "peft", "safetensors", "torch", "transformers")
        ),
        *(Entry(name, VERSION, IMPORTED) for name in ("deepspeed", "flash_attn", "kernels")),
        Entry("tensor_parallel", VERSION, NEEDED),
        Entry("cuda", VERSION),
        Entry("python", VERSION),
        Entry("rocm", VERSION),
        # Of an endpoint, what it says of itself.
        Entry("server", VERSION),
        Entry("cpu", MACHINE),
        Entry("cpu_isa", MACHINE),
        Entry("driver", MACHINE),
        Entry("gpu", MACHINE),
        Entry("libc", MACHINE),
        Entry(HOST, MACHINE, stored=False),
        # Of torch, for the GPU.
        Entry("allocator", SETTING, absent="default"),
        Entry("attn", SETTING),
        # Threads that transformers reads a checkpoint with.
        Entry("loader_threads", SETTING),
        # Of the C library.
        Entry("malloc", SETTING),
        Entry("revision", SETTING),
        Entry("threads", SETTING),
        # Of each time too.
        Entry("page_cache", SETTING, stored=False),
        # The spec's, told in reports.
        Entry("ranks", SETTING, stored=False),
    )
}


def libraries(present: str) -> list[str]:
    """Import names of the libraries whose version is an entry when they are ``present``."""
    return [entry.name for entry in ENTRIES.values() if entry.present == present]
