"""Write and read baselines as JSON that is laid out so that its diffs read like those of code."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pytest_llmload.baselines.model import SCHEMA, Baseline, RecordedTime
from pytest_llmload.core.errors import BaselineError
from pytest_llmload.core.portable import bounded
from pytest_llmload.core.quoting import printable
from pytest_llmload.core.results import KEPT, AllocationSite, ManifestRow, Numbers
from pytest_llmload.system.json_text import Unreadable, check_structure, short

_REMEDY = "restore it from version control, or delete it and record it again with --llm-update-baselines"
_TOP = {"schema", "digests", "memory", "work", "time", "numbers", "manifest", "spec", "workload", "environment"}
#: Entries that a file need not have: not every load has settings or keeps its allocations.
_OPTIONAL = {"suite", "settings", "allocations"}
_NUMBERS = {"buffers", "logits", "logsumexp", "margin"}
_OPTIONAL_NUMBERS = {"padded", "layers", "checksums"}
_SITE = {"bytes", "moment", "place", "site"}
_MOMENTS = ("load", "generate", KEPT)
_TIMING = ("median", "samples", "relative", "control", "parts")
#: Characters of the longest whole number that is read; a sign counts.
_DIGITS = 20
#: The most characters of a file's text, and the most objects and lists in it: the largest known baseline has some
#: hundred thousand characters.
LARGEST, _BRACKETS = 2 << 20, 100_000
#: The most modules that a manifest may describe: models with hundreds of experts in each of sixty layers have 50,000.
_MODULES = 100_000
#: ``0-3,7``; empty if the row describes one module.
_INDICES = re.compile(r"(?:\d{1,6}(?:-\d{1,6})?(?:,\d{1,6}(?:-\d{1,6})?)*)?", re.ASCII)
_ROW = {item.name: item.type for item in dataclasses.fields(ManifestRow)}


#: Characters of a sentence about a file's content.
_LONGEST = 500


class _Bad(Exception):
    """A fault in a file's content; the message lacks the file's name and what to do about it."""

    def __str__(self) -> str:
        # It may quote names of entries, which are the file's.
        return bounded(printable(super().__str__()), _LONGEST)


# --- writing -------------------------------------------------------------------------------------------------------


def dumps(baseline: Baseline) -> str:
    """Return the file's text: sections in a fixed order, keys sorted, one metric or manifest row per line.

    Raises ValueError for a number that is not finite, which JSON cannot hold.
    """
    numbers = baseline.numbers
    sections = {
        "schema": str(SCHEMA),
        "digests": _object({"shape": _line(baseline.shape), "weights": _line(baseline.weights)}),
        "memory": _object(_lines(baseline.memory)),
        "work": _object(_lines(baseline.work)),
        "time": _object(
            {
                host: _object({name: _line(timing_entry(timing)) for name, timing in timings.items()}, 2)
                for host, timings in baseline.time.items()
            }
        ),
        "numbers": _object(
            {
                "buffers": _object(_lines(numbers.buffers), 2),
                "logits": _line(numbers.logits),
                "logsumexp": _line(numbers.logsumexp),
                "margin": _line(numbers.margin),
                **({"padded": _line(numbers.padded)} if numbers.padded else {}),
                **({"layers": _object(_lines(numbers.layers), 2)} if numbers.layers else {}),
                **({"checksums": _object(_lines(numbers.checksums), 2)} if numbers.checksums else {}),
            }
        ),
        "manifest": _block("[]", (_line(dataclasses.asdict(row)) for row in baseline.manifest)),
        **({"settings": _object(_lines(baseline.settings))} if baseline.settings else {}),
        **({"allocations": _block("[]", map(_site_line, baseline.allocations))} if baseline.allocations else {}),
        "spec": _object(_lines(baseline.spec)),
        "workload": _line(baseline.workload),
        "environment": _object(_lines(baseline.environment)),
        **({"suite": _line(True)} if baseline.suite else {}),
    }
    return _block("{}", (f"{_line(name)}: {text}" for name, text in sections.items()), 0) + "\n"


def _line(value: object) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _site_line(each: AllocationSite) -> str:
    held_by = {"held_by": each.held_by} if each.held_by else {}
    return _line({name: getattr(each, name) for name in _SITE} | held_by)


def _lines(values: Mapping[str, object]) -> dict[str, str]:
    return {name: _line(value) for name, value in values.items()}


def _object(texts: Mapping[str, str], depth: int = 1) -> str:
    return _block("{}", (f"{_line(name)}: {texts[name]}" for name in sorted(texts)), depth)


def _block(brackets: str, items: Iterable[str], depth: int = 1) -> str:
    inner = "  " * (depth + 1)
    body = ",\n".join(f"{inner}{item}" for item in items)
    return f"{brackets[0]}\n{body}\n{'  ' * depth}{brackets[1]}" if body else brackets


def timing_entry(timing: RecordedTime) -> dict[str, Any]:
    """Return a time as its entry in a file: ``median``, ``samples`` and the conditions; empty values are omitted."""
    own: dict[str, Any] = {name: getattr(timing, name) for name in _TIMING}
    # A load does not have a control, and only a load has parts.
    return {name: value for name, value in own.items() if value not in ((), {})} | timing.conditions


# --- reading -------------------------------------------------------------------------------------------------------


def loads(text: str, source: str) -> Baseline:
    """Return the baseline in ``text``; ``source`` names the file in messages.

    Raises BaselineError with one sentence that says what is wrong and what to do.
    """
    if len(text) > LARGEST:
        raise BaselineError(f"{source} has {len(text)} characters, but a baseline has at most {LARGEST}: {_REMEDY}")
    if (opened := text.count("[") + text.count("{")) > _BRACKETS:
        what = f"opens {opened} objects and lists, but a baseline has at most {_BRACKETS}"
        raise BaselineError(f"{source} {what}: {_REMEDY}")
    if any(line.startswith(("<<<<<<< ", ">>>>>>> ")) for line in text.splitlines()):
        raise BaselineError(f"{source} holds unresolved merge conflicts: take one side, and record again if in doubt")
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_whole)
    except json.JSONDecodeError as error:
        what = "is empty" if not text.strip() else f"is not valid JSON (line {error.lineno}: {error.msg})"
        raise BaselineError(f"{source} {what}: {_REMEDY}") from None
    except RecursionError:
        raise BaselineError(f"{source} is nested too deeply to be a baseline: {_REMEDY}") from None
    except _Bad as error:
        raise BaselineError(f"{source} {error}: {_REMEDY}") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise BaselineError(
            f"{source} has schema {schema}, but this pytest-llmload reads schemas up to {SCHEMA}: "
            "upgrade pytest-llmload, or record the baseline again with this version"
        )
    try:
        check_structure(data)
        return _baseline(data)
    except (_Bad, Unreadable) as error:
        raise BaselineError(f"{source} {error}: {_REMEDY}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # A careless merge may leave a metric twice, and JSON would silently take the last one.
    values = dict(pairs)
    if len(values) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _Bad(f"holds {short(twice)} twice")
    return values


def _no_constant(name: str) -> float:
    raise _Bad(f"holds {name}, which is not a measured value")


def _whole(digits: str) -> int:
    # No measured value has more digits, and Python cannot turn longer ones into a float, or even into an int.
    if len(digits) > _DIGITS:
        raise _Bad(f"holds a number of {len(digits)} digits, {digits[:12]}…, which is not a measured value")
    return int(digits)


def read_timing(value: object, where: str) -> RecordedTime:
    """Return the time that an entry describes; ``where`` names its place in messages. Raises BaselineError."""
    try:
        return _read_timing(value, where)
    except _Bad as error:
        raise BaselineError(f"it {error}") from None


def _baseline(data: object) -> Baseline:
    top = _mapping(data, "the file")
    if unknown := sorted(set(top) - _TOP - _OPTIONAL):
        raise _Bad(f"has an unknown entry {short(unknown[0])}")
    if missing := sorted(_TOP - set(top)):
        raise _Bad(f"has no {missing[0]!r}")
    if top["schema"] != SCHEMA or isinstance(top["schema"], bool):
        raise _Bad(f"has schema {short(top['schema'])} instead of {SCHEMA}")
    digests = _strings(top["digests"], "digests")
    if set(digests) != {"shape", "weights"}:
        raise _Bad("needs exactly 'shape' and 'weights' in 'digests'")
    return Baseline(
        shape=digests["shape"],
        weights=digests["weights"],
        spec=_mapping(top["spec"], "spec"),
        workload=_string(top["workload"], "workload"),
        memory=_floats(top["memory"], "memory"),
        work=_floats(top["work"], "work"),
        time={
            host: {name: _read_timing(item, f"time, {host}, {name}") for name, item in _mapping(rows, host).items()}
            for host, rows in _mapping(top["time"], "time").items()
        },
        numbers=_read_numbers(top["numbers"]),
        manifest=_read_manifest(_list(top["manifest"], "manifest")),
        settings=_strings(top.get("settings", {}), "settings"),
        allocations=tuple(map(_read_site, _list(top.get("allocations", []), "allocations"))),
        environment=_strings(top["environment"], "environment"),
        suite=_true(top.get("suite", False), "suite"),
    )


def _true(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise _Bad(f"needs true or false in {where}")
    return value


def _read_site(value: object) -> AllocationSite:
    item = _mapping(value, "allocations")
    if not _SITE <= set(item) <= {*_SITE, "held_by"}:
        raise _Bad(f"needs exactly {', '.join(sorted(_SITE))} in an entry of 'allocations', and at most 'held_by' more")
    size = item["bytes"]
    if type(size) is not int or size < 0:
        raise _Bad(f"holds {short(size)} where 'allocations' needs a number of bytes")
    texts = _strings({name: text for name, text in item.items() if name != "bytes"}, "allocations")
    if texts["moment"] not in _MOMENTS:
        raise _Bad(f"holds {short(texts['moment'])} where 'allocations' needs one of {', '.join(_MOMENTS)}")
    return AllocationSite(texts["moment"], texts["place"], texts["site"], size, texts.get("held_by", ""))


def _read_timing(value: object, where: str) -> RecordedTime:
    item = _mapping(value, where)
    if not {"median", "samples"} <= set(item):
        raise _Bad(f"needs 'median' and 'samples' in {where}")
    conditions = {name: text for name, text in item.items() if name not in _TIMING}

    def processes(name: str) -> tuple[tuple[float, ...], ...]:
        return tuple(_times(samples, where) for samples in _list(item.get(name, []), where))

    timing = RecordedTime(
        _time(item["median"], f"{where}, median"),
        processes("samples"),
        _strings(conditions, where),
        processes("relative"),
        _times(item.get("control", []), where),
        _floats(item.get("parts", {}), where),
    )
    if not timing.samples or not all((*timing.samples, *timing.relative)):
        raise _Bad(f"holds a process without samples in {where}")
    return timing


def _times(value: object, where: str) -> tuple[float, ...]:
    return tuple(_time(number, where) for number in _list(value, where))


def _time(value: object, where: str) -> float:
    seconds = _float(value, where)
    if seconds <= 0:
        raise _Bad(f"holds a time of {seconds} in {where}")
    return seconds


def _read_numbers(value: object) -> Numbers:
    item = _mapping(value, "numbers")
    if set(item) - _OPTIONAL_NUMBERS != _NUMBERS:
        raise _Bad("needs exactly 'buffers', 'logits', 'logsumexp' and 'margin' in 'numbers'")
    vectors = {name: _vector(item.get(name, []), name) for name in ("logits", "logsumexp", "margin", "padded")}
    buffers, layers = (
        {name: _vector(values, name) for name, values in _mapping(item.get(kind, {}), kind).items()}
        for kind in ("buffers", "layers")
    )
    checksums = _strings(item.get("checksums", {}), "checksums")
    return Numbers(**vectors, buffers=buffers, layers=layers, checksums=checksums)


def _vector(value: object, where: str) -> list[float]:
    return [_float(x, where) for x in _list(value, where)]


def _read_manifest(rows: list[Any]) -> tuple[ManifestRow, ...]:
    read = tuple(_read_row(row, index) for index, row in enumerate(rows))
    modules = sum(_module_count(row.indices) for row in read)
    if modules > _MODULES:
        raise _Bad(f"describes {modules} modules in its manifest, but a model has at most {_MODULES}")
    return read


def _module_count(indices: str) -> int:
    """Return how many modules the numbers and ranges stand for, without making a list of them."""
    ends = (part.partition("-") for part in indices.split(",") if part)
    return sum(int(last or first) - int(first) + 1 for first, _, last in ends) or 1


def _read_row(value: object, index: int) -> ManifestRow:
    item = _mapping(value, f"manifest row {index + 1}")
    if set(item) != set(_ROW):
        raise _Bad(f"needs exactly {', '.join(sorted(_ROW))} in manifest row {index + 1}")
    for name, kind in _ROW.items():
        if type(item[name]).__name__ != kind:
            raise _Bad(f"holds {short(item[name])} where manifest row {index + 1} needs {kind} for {name!r}")
    row = ManifestRow(**item)
    wrong = {
        "indices": not _are_indices(row.indices),
        "quant": bool(row.quant) and not row.quant.split(),
        "count": row.count < 1,
        "bytes": row.bytes < 0,
    }
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        raise _Bad(f"holds {short(item[name])} for {name!r} in manifest row {index + 1}, which no module has")
    return row


def _are_indices(text: str) -> bool:
    """Return whether a text consists of numbers and ascending ranges."""
    if not _INDICES.fullmatch(text):
        return False
    ranges = [[int(number) for number in part.split("-")] for part in text.split(",") if part]
    return all(numbers == sorted(numbers) for numbers in ranges)


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Bad(f"holds {short(value)} where {where} needs an object")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Bad(f"holds {short(value)} where {where} needs a list")
    return value


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _Bad(f"holds {short(value)} where {where} needs a text")
    return value


def _strings(value: object, where: str) -> dict[str, str]:
    return {name: _string(text, f"{where}, {name}") for name, text in _mapping(value, where).items()}


def _float(value: object, where: str) -> float:
    # To Python, True is an int; it is not a measured value. 1e999 is read as infinity.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _Bad(f"holds {short(value)} where {where} needs a number")
    return value


def _floats(value: object, where: str) -> dict[str, float]:
    return {name: _float(number, f"{where}, {name}") for name, number in _mapping(value, where).items()}
