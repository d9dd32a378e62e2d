"""The formats of ``--llm-report FILE``. The file's suffix chooses the format.

A writer is a function from the report document (:func:`pytest_llmload.reports.document.document`) to the text of the
file. The first line of its docstring is its row in the documentation. One entry in :data:`WRITERS` adds a format: the
option's help, the check of the option and the end of the run all read this table.

A writer imports modules outside the standard library inside its function, so that a run without its format does not
import them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_llmload.reports import gitlab, html, json_report, markdown
from pytest_llmload.system.files import replace_text

Writer = Callable[[dict[str, Any]], str]

#: Suffix -> writer, in the order in which help and documentation list them.
WRITERS: dict[str, Writer] = {
    ".json": json_report.text,
    ".md": markdown.text,
    ".html": html.text,
    ".codequality.json": gitlab.text,
}


def known_suffixes() -> str:
    """Return the suffixes as one text: ``.json, .md``."""
    return ", ".join(WRITERS)


def suffix_of(file: str) -> str:
    """Return the longest suffix of a format that ``file`` ends in. Raises ValueError if it ends in none."""
    name = Path(file).name
    found = [suffix for suffix in WRITERS if name.endswith(suffix)]
    if not found:
        own = Path(file).suffix
        wrong = f"its suffix {own!r} is not the suffix of a report format" if own else "it has no suffix"
        raise ValueError(f"{file!r}: {wrong}; use one of {known_suffixes()}")
    return max(found, key=len)


def write(path: Path, document: dict[str, Any]) -> None:
    """Write the report document to ``path`` in the format of its suffix; a reader sees either the old or the new file.

    Raises OSError if the file cannot be written; an older report is then unchanged. Raises TypeError or ValueError if
    a different plugin put a value into the document that the format cannot hold.
    """
    replace_text(path, WRITERS[suffix_of(str(path))](document))
