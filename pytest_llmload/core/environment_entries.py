"""The entries of a load's environment, declared once: everything besides the model that its figures depend on.

The packages of strategies and quantisation methods are not in the table: each of them declares its own.

The load's process fills them, a baseline keeps those that are ``stored``, and comparing names what differs.
"""

from __future__ import annotations

from dataclasses import dataclass

#: The kind of host. It belongs to each time, not to the file: one file holds the times of several hosts.
HOST = "host"

VERSION = "version"
MACHINE = "machine"
SETTING = "setting"

#: When the version of a library is an entry: if it is installed; if this process has imported it; if a strategy of the
#: load needs it (the warm server may have imported it for a different load).
INSTALLED = "installed"
IMPORTED = "imported"
NEEDED = "needed"

UNKNOWN = "unknown"

#: In a list of entries that must be equal, stands for every entry that is not declared here: the version of a package
#: that a strategy or a quantisation method of the load declares.
PACKAGES = "packages"
#: The packages that hold quantised weights; the version of bitsandbytes is an entry of every load, if it is installed.
QUANTISERS = ("bitsandbytes", PACKAGES)


@dataclass(frozen=True)
class Entry:
    """One entry of an environment."""

    name: str
    kind: str
    #: For a library, when its version is an entry; ``name`` is then its import name. Empty for anything else.
    present: str = ""
    #: True if a baseline file keeps it.
    stored: bool = True
    #: The value that an environment without this entry is taken to have; ``unknown`` is equal to every value.
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
        # For an endpoint: what its server reports about itself.
        Entry("server", VERSION),
        Entry("cpu", MACHINE),
        Entry("cpu_isa", MACHINE),
        Entry("driver", MACHINE),
        Entry("gpu", MACHINE),
        Entry("libc", MACHINE),
        Entry(HOST, MACHINE, stored=False),
        # torch's caching allocator for GPU memory.
        Entry("allocator", SETTING, absent="default"),
        Entry("attn", SETTING),
        # Threads that transformers reads a checkpoint with.
        Entry("loader_threads", SETTING),
        # The C library's allocator.
        Entry("malloc", SETTING),
        Entry("revision", SETTING),
        Entry("threads", SETTING),
        # Stored with each time instead.
        Entry("page_cache", SETTING, stored=False),
        # Belongs to the spec; shown in reports.
        Entry("ranks", SETTING, stored=False),
    )
}


def entry_of(name: str) -> Entry:
    """Return the declaration of an entry; a name that is not declared is a package that the load needs."""
    return ENTRIES.get(name) or Entry(name, VERSION, NEEDED)


def libraries(present: str) -> list[str]:
    """Return the import names of the libraries whose version is an entry when they are ``present``."""
    return [entry.name for entry in ENTRIES.values() if entry.present == present]
