"""Write texts for GitHub Actions: annotations, groups, and log lines that the runner does not obey.

https://docs.github.com/actions/reference/workflow-commands-for-github-actions; the escapes are those of
``@actions/core`` (``packages/core/src/command.ts``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Number of error annotations of one step that GitHub shows.
MOST = 10
#: Characters of an annotation that are shown next to a diff; the summary has the rest.
_TEXT = 2_000


@dataclass(frozen=True)
class Annotation:
    """One failure or error, at its line."""

    title: str
    message: str
    #: Path relative to the repository; empty if the test is outside of it.
    file: str = ""
    line: int = 0


def errors(annotations: Sequence[Annotation]) -> list[str]:
    """Return one ``::error`` command per annotation; if there are too many, the last one says how many are missing."""
    shown = list(annotations[:MOST])
    if len(annotations) > MOST:
        rest = len(annotations) - MOST + 1
        shown[-1] = Annotation(f"{rest} more failed", "GitHub shows ten annotations of a step; see the job's summary")
    return [_error(annotation) for annotation in shown]


def _error(annotation: Annotation) -> str:
    given = {"file": annotation.file, "line": annotation.line if annotation.file else 0, "title": annotation.title}
    properties = ",".join(f"{name}={escape_property(str(value))}" for name, value in given.items() if value)
    return f"::error {properties}::{escape(annotation.message[:_TEXT])}"


def group(title: str, lines: Sequence[str], token: str) -> list[str]:
    """Return log lines as a folded group. The runner does not obey any line before ``token``, which must be secret."""
    return [f"::group::{escape(title)}", stop(token), *lines, resume(token), "::endgroup::"]


def stop(token: str) -> str:
    """Return the command after which the runner obeys no line until ``token``, which no text from outside knows."""
    return f"::stop-commands::{token}"


def resume(token: str) -> str:
    """Return the command that ends :func:`stop`."""
    return f"::{token}::"


def escape(text: str) -> str:
    """Return a text escaped for use as the message of a command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """Return a text escaped for use as a property of a command."""
    return escape(text).replace(":", "%3A").replace(",", "%2C")
