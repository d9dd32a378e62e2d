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
class EnvironmentEntry:
    """One entry of an environment."""

    name: str
    kind: str
    #: For a library, when its version is an entry; ``name`` is then its import name. Empty for anything else.
    present: str = ""
    #: True if a baseline file keeps it.
    stored: bool = True
    #: The value that an environment without this entry is taken to have; ``unknown`` is equal to every value.
    absent: str = UNKNOWN


ENTRIES: dict[str, EnvironmentEntry] = {
    entry.name: entry
    for entry in (
        *(
            EnvironmentEntry(name, VERSION, INSTALLED, absent="not installed")
            for name in ("accelerate", "bitsandbytes", "peft", "safetensors", "torch", "transformers")
        ),
        *(EnvironmentEntry(name, VERSION, IMPORTED) for name in ("deepspeed", "flash_attn", "kernels")),
        EnvironmentEntry("tensor_parallel", VERSION, NEEDED),
        EnvironmentEntry("cuda", VERSION),
        EnvironmentEntry("python", VERSION),
        EnvironmentEntry("rocm", VERSION),
        # For an endpoint: what its server reports about itself.
        EnvironmentEntry("server", VERSION),
        EnvironmentEntry("cpu", MACHINE),
        EnvironmentEntry("cpu_isa", MACHINE),
        EnvironmentEntry("driver", MACHINE),
        EnvironmentEntry("gpu", MACHINE),
        EnvironmentEntry("libc", MACHINE),
        EnvironmentEntry(HOST, MACHINE, stored=False),
        # torch's caching allocator for GPU memory.
        EnvironmentEntry("allocator", SETTING, absent="default"),
        EnvironmentEntry("attn", SETTING),
        # Threads that transformers reads a checkpoint with.
        EnvironmentEntry("loader_threads", SETTING),
        # The C library's allocator.
        EnvironmentEntry("malloc", SETTING),
        EnvironmentEntry("revision", SETTING),
        EnvironmentEntry("threads", SETTING),
        # Stored with each time instead.
        EnvironmentEntry("page_cache", SETTING, stored=False),
        # Belongs to the spec; shown in reports.
        EnvironmentEntry("ranks", SETTING, stored=False),
    )
}


def entry_of(name: str) -> EnvironmentEntry:
    """Return the declaration of an entry; a name that is not declared is a package that the load needs."""
    return ENTRIES.get(name) or EnvironmentEntry(name, VERSION, NEEDED)


def libraries(present: str) -> list[str]:
    """Return the import names of the libraries whose version is an entry when they are ``present``."""
    return [entry.name for entry in ENTRIES.values() if entry.present == present]
