"""One thing that a check found."""

from __future__ import annotations

from dataclasses import dataclass

ERROR, WARNING, FINE = "error", "warning", "ok"


@dataclass(frozen=True)
class Finding:
    """One thing that a check found, with the command that mends it."""

    #: Short name of the check: ``disk``, ``pip`` …
    check: str
    #: ``error`` (loads fail), ``warning`` (some loads may) or ``ok``.
    level: str
    #: What was found, and what was expected.
    message: str
    #: The command that mends it; empty where there is none, or nothing to mend.
    command: str = ""
