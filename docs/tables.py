"""The tables of the documentation, made from the code: ``python docs/tables.py`` writes them where they stand.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; a test says where one is not what the code says.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest_llmload
from pytest_llmload.core import errors
from pytest_llmload.core.metrics import METRICS
from pytest_llmload.core.presets import PRESETS
from pytest_llmload.core.verdicts import TABLE, Outcome, Row
from pytest_llmload.host.hooks import hookspecs
from pytest_llmload.host.markers import table
from pytest_llmload.host.settings.options import OPTIONS, help_text, ini_name
from pytest_llmload.process.serving.servers import KINDS
from pytest_llmload.quantisation.builtin import BUILTIN as QUANTISATION
from pytest_llmload.quantisation.registry import Methods
from pytest_llmload.reports.formats import WRITERS
from pytest_llmload.strategies import Strategy
from pytest_llmload.strategies.builtin import BUILTIN

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCS = Path(__file__).parent
_UNITS = {"B": "bytes", "s": "seconds", "1": "count"}
_LISTED = {
    "slack": "listed with its slack",
    "accepted": "listed as accepted",
    "recorded": "listed as recorded",
    "once": "reported once",
    "stale": "listed as stale",
}
#: Modules whose fixtures users have.
_FIXTURES = ("pytest_llmload.plugin",)


def metrics() -> str:
    """Every metric: unit, class, tolerance, what it depends on, and what it is."""
    rows = [
        (
            f"`{metric.name}`",
            _UNITS.get(metric.unit, metric.unit),
            metric.kind.replace("_", " "),
            _gate(metric.section, metric.informative, metric.tolerance.format(metric.unit)),
            ", ".join(metric.depends) or "-",
            metric.description,
        )
        for metric in METRICS.values()
    ]
    return _table(("metric", "unit", "class", "may move by", "compared only with equal", "what it is"), rows)


def _gate(section: str, informative: bool, tolerance: str) -> str:
    if informative:
        return "never gates"
    return (
        f"{tolerance}, judged over processes" if section == "time" else "nothing" if tolerance == "exact" else tolerance
    )


def verdicts() -> str:
    """Every verdict, and what it does to the test."""
    rows = [
        (_verdicts(row), *(_outcome(item) for item in (row.default, row.strict, row.update, row.record_missing)))
        for row in TABLE
    ]
    return _table(("verdict", "default", "`--llm-strict`", "`--llm-update-baselines`", "`--llm-record-missing`"), rows)


def _verdicts(row: Row) -> str:
    text = ", ".join(f"`{verdict}`" for verdict in row.verdicts)
    return f"{text} (one metric)" if row.metric_only else text


def _outcome(outcome: Outcome) -> str:
    parts = [outcome.status, *(["written"] if outcome.writes else []), *filter(None, [_LISTED.get(outcome.listed, "")])]
    return ", ".join(parts)


def options() -> str:
    """Every option: how it is written, its ini setting, and its help."""

    def written(name: str, attributes: dict[str, Any]) -> str:
        value = "|".join(attributes.get("choices", ())) or attributes.get("metavar", "")
        return f"`--llm-{name} {value}".rstrip() + "`"

    rows = [
        (written(name, attributes), f"`{ini_name(name)}`" if ini_type else "none", help_text(name))
        for name, (ini_type, _, attributes) in OPTIONS.items()
    ]
    return _table(("option", "ini", "meaning"), rows)


def markers() -> str:
    """Every marker: its signature and its help."""
    parts = [line.partition("): ") for line in table.lines()]
    return _table(("marker", "says"), [(f"`{signature})`", text) for signature, _, text in parts])


def fixtures() -> str:
    """Every fixture: its scope and its help."""
    return _table(("fixture", "scope", "gives"), [row for name in _FIXTURES for row in _fixtures(name)])


def _fixtures(module: str) -> Iterator[tuple[str, str, str]]:
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    body = ast.parse(Path(found.origin).read_text(encoding="utf-8")).body
    for node in (node for node in body if isinstance(node, ast.FunctionDef)):
        for decorator in node.decorator_list:
            text = ast.unparse(decorator)
            if text.startswith("pytest.fixture"):
                scope = re.search(r"scope='(\w+)'", text)
                yield f"`{node.name}`", scope[1] if scope else "function", _first_line(ast.get_docstring(node))


def public_errors() -> str:
    """Every error that can be imported from the package: its base and what it means."""
    rows = [
        (f"`{name}`", ", ".join(f"`{base.__name__}`" for base in error.__bases__), _first_line(error.__doc__))
        for name, error in vars(errors).items()
        if name in pytest_llmload.__all__
    ]
    return _table(("error", "is a", "means"), rows)


def hooks() -> str:
    """Every hook: its arguments and what it is for."""
    rows = [
        (f"`{name}({', '.join(inspect.signature(hook).parameters)})`", _first_line(hook.__doc__).removesuffix(" ::"))
        for name, hook in vars(hookspecs).items()
        if name.startswith("pytest_llmload_")
    ]
    return _table(("hook", "for"), rows)


def reports() -> str:
    """Every report format: its suffix and what it holds."""
    texts = {suffix: _first_line(writer.__doc__).removeprefix("Return ") for suffix, writer in WRITERS.items()}
    rows = [(f"`{suffix}`", text[:1].upper() + text[1:]) for suffix, text in texts.items()]
    return _table(("suffix", "report"), rows)


def presets() -> str:
    """Every preset: its architecture and geometry."""

    def get(config: dict[str, Any], *names: str) -> Any:
        return next((config[name] for name in names if name in config), "-")

    rows = [
        (
            f"`random:{name}`",
            config["architectures"][0],
            str(get(config, "num_hidden_layers", "n_layer")),
            str(get(config, "hidden_size", "n_embd")),
            str(get(config, "num_attention_heads", "n_head")),
            str(config["vocab_size"]),
            config["dtype"],
        )
        for name, config in PRESETS.items()
    ]
    return _table(("model", "class", "layers", "hidden", "heads", "vocabulary", "stored in"), rows)


def extras() -> str:
    """Every extra for users, and what it installs."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = [
        (f"`pytest-llmload[{name}]`", ", ".join(f"`{package}`" for package in packages) or "nothing more")
        for name, packages in project["optional-dependencies"].items()
        if name != "dev"
    ]
    return _table(("extra", "installs"), rows)


def strategies() -> str:
    """Every strategy: what it is, and which packages it needs beyond those of the extra ``hf``."""
    rows = []
    for name, strategy in BUILTIN.items():
        needs = [package for package in strategy.packages if package not in Strategy.packages]
        rows.append((f"`{name}`", strategy.summary, ", ".join(f"`{package}`" for package in needs) or "-"))
    return _table(("strategy", "is", "needs"), rows)


def schemes() -> str:
    """Every scheme of ``quant(...)``: what it is, its bits, its options, and its packages."""
    rows = [
        (
            f"`{scheme.name}`",
            scheme.summary,
            f"{scheme.bits:g}",
            ", ".join(f"`{option}`" for option in scheme.options),
            ", ".join(f"`{package}`" for package in (*method.packages, *scheme.packages)) or "-",
        )
        for scheme, method in Methods().schemes.values()
    ]
    return _table(("scheme", "is", "bits", "options", "needs"), rows)


def quantisation() -> str:
    """Every quantisation method: what it needs, where it runs, where its bytes are, and what is proved."""
    rows = [
        (
            method.name,
            method.summary,
            ", ".join(f"`{package}`" for package in method.packages) or "-",
            method.runs_on,
            method.held_as,
            method.proved,
        )
        for method in QUANTISATION
    ]
    return _table(("method", "is", "needs", "runs quantised on", "held as", "proved"), rows)


def _first_line(text: str | None) -> str:
    return inspect.cleandoc(text or "").partition("\n")[0]


def servers() -> str:
    """Every kind of model server: how it is asked for exact figures, and where it says what."""
    rows = [
        (
            kind.name,
            kind.exact_tokens,
            kind.token_count,
            kind.token_ids or "-",
            f"`{kind.health}`",
            kind.model_id,
            kind.version,
            kind.capacity or "-",
            kind.concurrency,
        )
        for kind in KINDS
    ]
    head = ("server", "exactly N tokens", "tokens counted by", "token ids", "healthy", "model", "version")
    return _table((*head, "cache capacity", "eight at once"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    # A bar inside a cell would start another one.
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def adapters() -> str:
    """PEFT's configuration classes, and the adapters of each that the tests save, load, damage and merge."""
    file = DOCS.parent / "tests" / "worker" / "adapter_kinds.py"
    assigned = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.AnnAssign)]
    (kinds,) = (node.value for node in assigned if isinstance(node.target, ast.Name) and node.target.id == "KINDS")
    assert isinstance(kinds, ast.Dict)
    found: dict[str, list[str]] = {}
    for key, value in zip(kinds.keys, kinds.values, strict=True):
        assert isinstance(key, ast.Constant)
        assert isinstance(value, ast.Call)
        first = value.args[0] if value.args else None
        config = first.value if isinstance(first, ast.Constant) else "LoraConfig"
        found.setdefault(str(config), []).append(str(key.value))
    rows = [(f"`{config}`", ", ".join(names)) for config, names in sorted(found.items())]
    return _table(("PEFT's configuration", "adapters in the tests"), rows)


#: Name -> the page that the table stands on, and the function that makes it.
TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "metrics": ("baselines.md", metrics),
    "verdicts": ("baselines.md", verdicts),
    "extras": ("reference.md", extras),
    "options": ("reference.md", options),
    "markers": ("reference.md", markers),
    "fixtures": ("reference.md", fixtures),
    "errors": ("reference.md", public_errors),
    "hooks": ("reference.md", hooks),
    "reports": ("reference.md", reports),
    "strategies": ("reference.md", strategies),
    "presets": ("strategies.md", presets),
    "adapters": ("strategies/lora.md", adapters),
    "schemes": ("strategies/quantisation.md", schemes),
    "quantisation": ("strategies/quantisation.md", quantisation),
    "servers": ("strategies/served.md", servers),
}


def replaced(text: str, name: str, table: str) -> str:
    """A page with one table replaced. Raises ValueError where it is not there exactly once."""
    pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
    text, count = re.subn(pattern, lambda match: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"<!-- table: {name} --> … <!-- end --> is there {count} times")
    return text


def main() -> None:
    """Write every table."""
    for name, (page, make) in TABLES.items():
        path = DOCS / page
        path.write_text(replaced(path.read_text(encoding="utf-8"), name, make()), encoding="utf-8")


if __name__ == "__main__":
    main()
