"""The documentation says what the code says, and every page of it can be found."""

from __future__ import annotations

import importlib.util
import re
import sys
from argparse import BooleanOptionalAction
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from pytest_llmload import plugin
from pytest_llmload.baselines.codec import dumps, loads
from pytest_llmload.cli import COMMANDS
from pytest_llmload.core.metrics import Metric
from pytest_llmload.core.presets import PRESETS
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.host.hooks.grouping import Grouping
from pytest_llmload.host.loads.llm import LLM, Memory, Timing
from pytest_llmload.host.markers.base import LoadMarker
from pytest_llmload.host.markers.table import LOAD_MARKERS, markers
from pytest_llmload.host.settings.options import OPTIONS
from pytest_llmload.quantisation import Method, Scheme, registry
from pytest_llmload.quantisation import builtin as quantisation_methods
from pytest_llmload.strategies import Strategy
from pytest_llmload.strategies.builtin import BUILTIN
from pytest_llmload.testing import load_once

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: Pages of the site that show a file of the root.
SHOWN = {DOCS / "index.md", DOCS / "contributing.md", DOCS / "changelog.md"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(set(DOCS.rglob("*.md")) - SHOWN)]
REFERENCE = (DOCS / "reference.md").read_text(encoding="utf-8")
BASELINES = (DOCS / "baselines.md").read_text(encoding="utf-8")

# The tables list what serves too; an environment of the oldest libraries has no client for it.
pytest.importorskip("httpcore")
_spec = importlib.util.spec_from_file_location("tables", DOCS / "tables.py")
assert _spec is not None
assert _spec.loader is not None
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)


@pytest.mark.parametrize("name", tables.TABLES)
def test_each_table_is_what_the_code_says(name: str) -> None:
    page, make = tables.TABLES[name]
    text = (DOCS / page).read_text(encoding="utf-8")
    assert tables.replaced(text, name, make()) == text, f"docs/{page}: python docs/tables.py"


def test_a_table_that_is_nowhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 times"):
        tables.replaced("text", "metrics", "| a |")


def test_an_extension_is_documented_by_its_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy, a method with a scheme, a metric, a marker and a report format: each in its table at once."""

    class HalfContext(Strategy):
        name = "half_context"
        summary = "Everything on one device, with half of the positions."
        packages = (*Strategy.packages, "halving")

    class Rows(Method):
        name = "rows"
        summary = "int8 with a scale a row."
        packages = ("rows_kernels",)
        schemes = (Scheme("rows-int8", "Rows in 8 bit.", 8),)

    class Threads(LoadMarker):
        """Load with so many threads."""

        name = "threads"

        @staticmethod
        def signature(count: int) -> None: ...

    def verdict_lines(document: dict[str, Any]) -> str:
        """One line a load."""
        return ""

    joules = Metric("power.joules", "J", "driver", "2%", "Energy of generating the workload")
    monkeypatch.setitem(tables.BUILTIN, "half_context", HalfContext)
    methods = (*quantisation_methods.BUILTIN, Rows)
    monkeypatch.setattr(tables, "QUANTISATION", methods)
    monkeypatch.setattr(registry, "BUILTIN", methods)
    monkeypatch.setitem(tables.METRICS, joules.name, joules)
    monkeypatch.setitem(LOAD_MARKERS, "threads", Threads)
    monkeypatch.setitem(tables.WRITERS, ".csv", verdict_lines)
    rows = {
        "strategies": "| `half_context` | Everything on one device, with half of the positions. | `halving` |",
        "schemes": "| `rows-int8` | Rows in 8 bit. | 8 | `skip_modules`, `dense_ok` | `rows_kernels` |",
        "quantisation": "| rows | int8 with a scale a row. | `rows_kernels` |",
        "metrics": "| `power.joules` | J | driver | 2 % | - | Energy of generating the workload |",
        "markers": "| `threads(count)` | Load with so many threads. |",
        "reports": "| `.csv` | One line a load. |",
    }
    for name, row in rows.items():
        assert row in tables.TABLES[name][1](), name


def test_what_users_can_name_is_in_the_reference() -> None:
    names = {
        *(f"--llm-{name}" for name in OPTIONS),
        *(f"`{name}(" for name in markers()),
        *("`llm`", "`llm_spec`", "`llm_load`", "`llm_gpus`", "`memory_baseline`", "`latency_baseline`"),
        *("`llm_benchmark`", "load_once", "strategies.Strategy", "import Metric, Probe"),
        *(f"`{name}`" for name in tables.pytest_llmload.__all__),
        *(f"`{name}`" for name in BUILTIN),
        *(name for name in vars(tables.hookspecs) if name.startswith("pytest_llmload_")),
        *(f"`{name}=" for name, each in signature(load_once).parameters.items() if each.kind is each.KEYWORD_ONLY),
    }
    assert {name for name in names if name not in REFERENCE} == set()
    commands = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert {name for name in COMMANDS if f"| `llmload {name} " not in commands} == set()
    strategies = (DOCS / "strategies.md").read_text(encoding="utf-8")
    described = strategies[strategies.index("## The strategies") : strategies.index("## Known failures")]
    assert {name for name in BUILTIN if f"`{name}`" not in described} == set()
    assert {name for name in PRESETS if f"`random:{name}`" not in strategies} == set()


def test_every_check_of_a_load_is_in_the_table_of_checks() -> None:
    sources = (ROOT / "pytest_llmload" / "worker").rglob("*.py")
    checks = {name for file in sources for name in re.findall(r'^CHECK = "(\w+)"$', file.read_text(), re.MULTILINE)}
    assert len(checks) > 10
    strategies = (DOCS / "strategies.md").read_text(encoding="utf-8")
    table = strategies[strategies.index("| check | fails when |") : strategies.index("**The limits of sampling:**")]
    rows = {name for names in re.findall(r"^\| ([\w, ]+) \|", table, re.MULTILINE) for name in names.split(", ")}
    assert checks - rows == set()


def test_every_switch_that_can_be_turned_off_is_named_with_its_other_form() -> None:
    (sentence,) = re.findall(r"^- (.*(?:\n  .*)*?) have a `--no-", REFERENCE, re.MULTILINE)
    switches = {f"--llm-{name}" for name in OPTIONS if OPTIONS[name][2].get("action") is BooleanOptionalAction}
    assert set(re.findall(r"`(--llm-[\w-]+)`", sentence)) == switches


def test_every_page_can_be_reached_from_the_readme() -> None:
    # By way of the repository, where GitHub shows it.
    reached, new = set(), {PAGES[0], ROOT / "CONTRIBUTING.md"}
    while new:
        page = new.pop()
        reached.add(page)
        new |= {target for target, _ in links(page) if target.suffix == ".md"} - reached
    assert set(PAGES) - reached == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {target.name}#{anchor}"


def links(page: Path) -> Iterator[tuple[Path, str]]:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            yield (page.parent / target).resolve() if target else page, anchor


def anchors(page: Path) -> Iterator[str]:
    """As GitHub makes them from headings."""
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_documented_baseline_is_one_that_can_be_read() -> None:
    example = re.search(r"```json\n(.*?)```", BASELINES, re.DOTALL)
    assert example is not None
    assert dumps(loads(example[1], "docs")) == example[1]


def test_the_documented_kind_of_host_is_written_as_a_recorded_one() -> None:
    example = re.search(r'"time": \{\n    "(.*?)"', BASELINES)
    assert example is not None
    recorded = loads((ROOT / "baselines/llama-1b/nvidia-h100-80gb-hbm3/none.json").read_text(encoding="utf-8"), "")
    assert example[1] in recorded.time


def test_every_page_is_on_the_site() -> None:
    listed = re.findall(r"^([\w/-]+)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {DOCS / f"{name}.md" for name in listed} == set(DOCS.rglob("*.md")) - {DOCS / "index.md"}


def test_the_picture_of_the_layers_is_the_contract_that_is_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = project["tool"]["importlinter"]["contracts"][0]["layers"]
    checked = [[name.strip().removeprefix("pytest_llmload.") for name in layer.split("|")] for layer in contract]
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    picture = page[page.index("## Layers") :].split("```")[1].splitlines()[1:]
    drawn = [re.split(r"\s+│\s+", line.strip().split("  ")[0]) for line in picture]
    assert [sorted(layer) for layer in drawn] == [sorted(layer) for layer in checked]
    homes = {path.stem for path in (ROOT / "pytest_llmload").iterdir() if not path.name.startswith("_")}
    assert {name for layer in drawn for name in layer} == homes - {"py"}


def test_every_hook_says_what_it_does_and_where_pytest_describes_it() -> None:
    hooks = [
        (name, hook)
        for place in (plugin, Grouping)
        for name, hook in vars(place).items()
        if name.startswith("pytest_") and callable(hook)
    ]
    assert len(hooks) >= 20
    reference = "https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec"
    assert [name for name, hook in hooks if f"{reference}.{name}\n" not in (hook.__doc__ or "")] == []


@pytest.mark.parametrize("kind", [LLM, Memory, Timing, LoadResult, LoadSpec], ids=lambda kind: kind.__name__)
def test_every_public_member_has_a_docstring(kind: type) -> None:
    members = {name: member for name, member in vars(kind).items() if not name.startswith("_")}
    bare = [
        name
        for name, member in members.items()
        if (callable(member) or isinstance(member, (property, classmethod))) and not member.__doc__
    ]
    assert bare == []
