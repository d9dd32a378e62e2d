"""What a user wrote is quoted on one printable line, however long it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_llmload.baselines.codec import loads
from pytest_llmload.core.errors import BaselineError
from pytest_llmload.core.presets import config_of
from pytest_llmload.core.quoting import quoted
from pytest_llmload.core.spec import Workload
from pytest_llmload.core.units import parse_bytes, parse_seconds, parse_tolerance
from pytest_llmload.host.settings.adapters import parse_adapter
from pytest_llmload.host.settings.models import parse_model

LONG = "[" * 100_000


def test_a_quotation_is_cut_and_printable() -> None:
    assert quoted("8GiB") == "'8GiB'"
    assert quoted("a\n\u202e\xa0") == "'a\\n\\u202e\\xa0'"
    assert quoted(LONG) == f"'{119 * '['}… (99882 more characters)"


@pytest.mark.parametrize(
    "parse",
    [
        parse_bytes,
        Workload.parse,
        lambda text: parse_tolerance(text, unit="B"),
        lambda text: parse_model(text, base=Path()),
        lambda text: parse_model(f"random:{text}", base=Path()),
        lambda text: parse_adapter(text, base=Path(), root=Path()),
        lambda text: config_of(f"random:{text}"),
    ],
)
def test_a_long_value_is_a_short_message(parse: object) -> None:
    with pytest.raises(ValueError, match="more characters") as caught:
        parse(LONG)  # type: ignore[operator]
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("parse", "unit"), [(parse_bytes, "GiB"), (parse_seconds, "s")])
def test_a_number_beyond_all_sizes_is_refused(parse: object, unit: str) -> None:
    with pytest.raises(ValueError, match="is larger than any "):
        parse(f"{'8' * 400}{unit}")  # type: ignore[operator]


@pytest.mark.parametrize("section", ["digests", "memory"])
def test_a_name_in_a_baseline_is_shown_as_escapes(section: str) -> None:
    file = next((Path(__file__).parents[2] / "baselines").rglob("*.json"))
    data = json.loads(file.read_text())
    data[section]["\x1b"] = []
    with pytest.raises(BaselineError) as caught:
        loads(json.dumps(data), "baseline")
    assert str(caught.value).isprintable()
    assert rf"holds [] where {section}, \x1b needs a " in str(caught.value)
