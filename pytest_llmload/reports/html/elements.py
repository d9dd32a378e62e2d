"""Build HTML as a tree, in which text can never become markup, wherever it comes from."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence

Child = ET.Element | str | None
#: The text of a cell that has nothing to say.
NONE = "–"
#: Classes of tables whose rows become paragraphs on a narrow screen, where each cell needs the title of its column.
_STACKED = ("bars", "loads", "moved")


def el(tag: str, *children: Child, **attributes: object) -> ET.Element:
    """Return an element. ``class_`` is written ``class``, other underscores become dashes.

    None and False omit an attribute; True writes it without a value.
    """
    given = {
        name.rstrip("_").replace("_", "-"): "" if value is True else str(value)
        for name, value in attributes.items()
        if value is not None and value is not False
    }
    element = ET.Element(tag, given)
    for child in children:
        if child is None:
            continue
        if isinstance(child, ET.Element):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + child
        else:
            element.text = (element.text or "") + child
    return element


def table(caption: str, head: Sequence[str], rows: Iterable[ET.Element], **attributes: object) -> ET.Element:
    """Return a table that scrolls on its own in a narrow window, also by keyboard.

    ``rows`` are rows, or groups of rows made by :func:`group`. A column of figures has its title to the right.
    """
    found = list(rows)
    groups = [found] if found and found[0].tag == "tr" else None
    bodies = [el("tbody", *group) for group in groups] if groups is not None else found
    cells = list(bodies[0][0]) if bodies else []
    sides = [cell.get("class") if cell.get("class") == "num" else None for cell in cells]
    titles = [el("th", title, scope="col", class_=side) for title, side in zip(head, sides, strict=False)]
    if attributes.get("class_") in _STACKED:
        _label(bodies, head)
    whole = el("table", el("caption", caption), el("thead", el("tr", *titles)), *bodies, **attributes)
    return el("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _label(bodies: Iterable[ET.Element], head: Sequence[str]) -> None:
    """Give every cell the title of its column; rows of a group lack the first column's."""
    for cell_row in (each for body in bodies for each in body):
        for cell, title in zip(reversed(cell_row), reversed(head), strict=False):
            if cell.tag == "td" and "".join(cell.itertext()) in ("", NONE) and cell.get("class") != "wide":
                cell.set("class", f"{cell.get('class', '')} none".strip())
            elif cell.tag == "td" and title:
                cell.set("data-label", title)


def group(heading: Child, rows: Sequence[ET.Element], **attributes: object) -> ET.Element:
    """Return rows that share one heading; the rows are made by :func:`cells`."""
    rows[0].insert(0, el("th", heading, scope="rowgroup", rowspan=len(rows) if len(rows) > 1 else None))
    return el("tbody", *rows, **attributes)


def cells(*texts: Child) -> ET.Element:
    """Return a table row without a heading."""
    return el("tr", *(text if isinstance(text, ET.Element) and text.tag == "td" else el("td", text) for text in texts))


def row(heading: Child, *texts: Child, **attributes: object) -> ET.Element:
    """Return a table row with a heading; :func:`figure` makes the cells of figures."""
    return el("tr", el("th", heading, scope="row"), *cells(*texts), **attributes)


def figure(text: str) -> ET.Element:
    """Return a cell whose text is aligned to the right, so that digits line up."""
    return el("td", text, class_="num")


def legend(*keys: tuple[str, str]) -> ET.Element:
    """Return a legend that explains the colours and marks of a chart."""
    return el("p", *(el("span", el("i", class_=f"key {kind}"), f"{text} ") for kind, text in keys), class_="legend")


def chip(verdict: str) -> ET.Element:
    """Return a verdict as a coloured word."""
    return el("span", verdict.replace("_", " "), class_=f"chip {tone(verdict)}")


_TONES = {
    **dict.fromkeys(("regressed", "changed", "missing", "over_limit", "test_failed"), "bad"),
    **dict.fromkeys(("not_applied", "out_of_memory", "crashed", "timeout", "failed", "machine"), "bad"),
    **dict.fromkeys(("ok", "accepted", "recorded", "measured"), "good"),
    "improved": "better",
}


def tone(verdict: str) -> str:
    """Return the class that colours a verdict: ``bad``, ``good``, ``better`` or ``aside``."""
    return _TONES.get(verdict, "aside")


def text_of(document: ET.Element) -> str:
    """Return the text of the tree as a complete HTML file."""
    return "<!doctype html>\n" + ET.tostring(document, encoding="unicode", method="html") + "\n"
