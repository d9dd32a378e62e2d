"""The file format: what is written, that it comes back, and what is said of a file that is broken."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from sample_loads import ENVIRONMENT, HOST, NF4, baseline_of, load, numbers

from pytest_llmload.baselines.codec import dumps, loads
from pytest_llmload.baselines.environment import stored
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.core.errors import BaselineError
from pytest_llmload.core.portable import scrub
from pytest_llmload.core.results import KEPT, AllocationSite

FILE = "baselines/polyglot-ko-12.8b/nvidia-h100-80gb-hbm3/nf4-dq.json"


SITE = {"bytes": 1, "moment": "load", "place": "host", "site": "a.py:1 in f"}


@pytest.fixture
def baseline() -> Baseline:
    return baseline_of(None, [load(), load()], update=True)


def test_a_baseline_comes_back_from_its_text(baseline: Baseline) -> None:
    assert loads(dumps(baseline), FILE) == baseline
    assert dumps(loads(dumps(baseline), FILE)) == dumps(baseline)


def test_that_the_suite_recorded_it_is_kept(baseline: Baseline) -> None:
    assert '"suite"' not in dumps(baseline)
    text = dumps(dataclasses.replace(baseline, suite=True))
    assert text.endswith('  "suite": true\n}\n')
    assert loads(text, FILE).suite
    with pytest.raises(BaselineError, match="needs true or false in suite"):
        loads(text.replace("true", "1"), FILE)


def test_an_empty_baseline_comes_back_too(baseline: Baseline) -> None:
    empty = dataclasses.replace(baseline, memory={}, time={}, manifest=(), numbers=type(baseline.numbers)())
    assert loads(dumps(empty), FILE) == empty


def test_the_layout_makes_short_diffs(baseline: Baseline) -> None:
    text = dumps(baseline)
    lines = text.splitlines()
    assert '    "gpu.settled": 7130382336,' in lines
    assert sum(line.startswith('    {"bytes": ') for line in lines) == len(baseline.manifest)
    data = json.loads(text)
    assert list(data)[:3] == ["schema", "digests", "memory"]
    assert list(data)[-3:] == ["spec", "workload", "environment"]
    for section in ("memory", "spec", "environment", "numbers"):
        assert list(data[section]) == sorted(data[section])
    assert text.endswith("}\n")


def test_one_changed_metric_changes_one_line(baseline: Baseline) -> None:
    changed = dataclasses.replace(baseline, memory={**baseline.memory, "gpu.settled": 1})
    before, after = dumps(baseline).splitlines(), dumps(changed).splitlines()
    assert [(old.strip(), new.strip()) for old, new in zip(before, after, strict=True) if old != new] == [
        ('"gpu.settled": 7130382336,', '"gpu.settled": 1,')
    ]


def test_measured_floats_are_stored_with_six_digits() -> None:
    result = load(samples={"load": [12.3456789], "ttft": [0.01234567891], "per_token": [1 / 3]})
    text = dumps(baseline_of(None, [result], update=True))
    assert '"load": {"median": 12.3457, "page_cache": "warm", "samples": [[12.346]]}' in text
    assert '"per_token": {"median": 0.333333, "samples": [[0.33333]]}' in text
    assert "0.012346" in text


def test_nothing_of_this_machine_and_no_secret_is_stored() -> None:
    spec = dataclasses.replace(
        NF4,
        model="/home/somebody/models/secret-project",
        adapter="/mnt/runs/17/adapter",
        options=(("offload_folder", '"/tmp/offload"'), ("token", '"hf_abcdefghijklmnopqrstuvwx"')),
        env=(
            ("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwx"),
            ("HF_ENDPOINT", "https://me:pass@hub.local"),
            ("A_B", "7"),
            ("MY_API_KEY", "s3cr3t"),
        ),
    )
    environment = {**ENVIRONMENT, "user": "somebody", "HF_HOME": "/home/somebody/.cache", "commit": "0badc0de"}
    baseline = baseline_of(None, [load(spec, environment=environment)], update=True)
    text = dumps(baseline)
    assert not re.search(r"s3cr3t|somebody|/mnt|/tmp|hf_abc|me:pass|0badc0de|secret-project", text)
    assert baseline.spec["adapter"] == "adapter"
    assert ["A_B", "7"] in baseline.spec["env"]
    assert stored({"commit": "1", "torch": "2.13.0"}) == {"torch": "2.13.0"}


def test_a_token_is_hidden_and_a_name_of_transformers_is_not() -> None:
    line = "in hf_quantizer.preprocess_model: token hf_abcdefghijklmnopqrstuvwx"
    assert scrub(line) == "in hf_quantizer.preprocess_model: token ***"


def test_numbers_that_json_cannot_hold_are_never_written(baseline: Baseline) -> None:
    with pytest.raises(ValueError, match="JSON"):
        dumps(dataclasses.replace(baseline, memory={"gpu.settled": math.nan}))


def broken(baseline: Baseline, change: Callable[[dict[str, Any]], object]) -> str:
    """The file's text with one entry of its data changed."""
    data = json.loads(dumps(baseline))
    change(data)
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(data)
    finally:
        sys.set_int_max_str_digits(limit)


def test_lines_that_allocate_are_optional_and_one_a_line(baseline: Baseline) -> None:
    assert '"allocations"' not in dumps(baseline)
    sites = (
        AllocationSite("load", "host", "a.py:1 in f", 3 << 20),
        AllocationSite(KEPT, "gpu.0", "b.py:1 in g", 1 << 20, "b.COPIES"),
    )
    text = dumps(dataclasses.replace(baseline, allocations=sites))
    assert '    {"bytes": 3145728, "moment": "load", "place": "host", "site": "a.py:1 in f"},\n' in text
    assert loads(text, FILE).allocations == sites


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda data: data.update(memory=[]), r"holds \[\] where memory needs an object"),
        (lambda data: data["memory"].update({"gpu.settled": "7 GiB"}), "holds '7 GiB' where memory, gpu.settled needs"),
        (
            lambda data: data["memory"].update({"gpu.settled": True}),
            "holds true where memory, gpu.settled needs a number",
        ),
        (lambda data: data["time"][HOST]["load"].pop("samples"), "needs 'median' and 'samples' in time, .*, load"),
        (lambda data: data["time"].update({HOST: 3}), "holds 3 where .* needs an object"),
        (lambda data: data["manifest"][0].pop("quant"), "in manifest row 1"),
        (lambda data: data["manifest"][2].update(bytes=1.5), "holds 1.5 where manifest row 3 needs int for 'bytes'"),
        (lambda data: data["numbers"].update(logits=None), "holds null where logits needs a list"),
        (lambda data: data["digests"].pop("shape"), "needs exactly 'shape' and 'weights' in 'digests'"),
        (lambda data: data.update(workload=7), "holds 7 where workload needs a text"),
        (lambda data: data.pop("spec"), "has no 'spec'"),
        (lambda data: data.update(memroy={}), "has an unknown entry 'memroy'"),
        *(
            (lambda data, row=row: data.update(allocations=[row]), what)
            for row, what in (
                (3, "holds 3 where allocations needs an object"),
                ({"bytes": 1}, "needs exactly bytes, moment, place, site in an entry of 'allocations'"),
                ({**SITE, "bytes": -1}, "holds -1 where 'allocations' needs a number of bytes"),
                ({**SITE, "moment": "never"}, "holds 'never' where 'allocations' needs one of load, generate, kept"),
                ({**SITE, "site": 1}, "holds 1 where allocations, site needs a text"),
            )
        ),
        (lambda data: data.update(schema="one"), "has schema 'one' instead of 1"),
        (lambda data: data["memory"].update({"gpu.settled": 1e999}), "holds Infinity"),
        (lambda data: data["memory"].update({"gpu.settled": 10**400}), r"holds a number of 401 digits, 100000000000…"),
        (lambda data: data["manifest"][1].update(bytes=10**5000), r"holds a number of 5001 digits"),
        (lambda data: data["time"][HOST]["load"].update(median=0), "holds a time of 0 in time, .*, load, median"),
        (lambda data: data["time"][HOST]["load"].update(samples=[[-1.0]]), "holds a time of -1.0 in time, .*, load"),
        *(
            (
                lambda data, text=text: data["manifest"][1].update(indices=text),
                f"holds '{text}' for 'indices' in manifest row 2",
            )
            for text in ("a-b", "5-1", "1-", "1,,2", "0-1-2", "-3", " 1", "0-99999999999", "²")
        ),
        (lambda data: data["manifest"][1].update(quant=" "), "holds ' ' for 'quant' in manifest row 2"),
        (lambda data: data["manifest"][1].update(count=0), "holds 0 for 'count' in manifest row 2"),
        (lambda data: data["manifest"][1].update(bytes=-1), "holds -1 for 'bytes' in manifest row 2"),
    ],
)
def test_wrong_types_are_one_clear_sentence(
    baseline: Baseline, change: Callable[[dict[str, Any]], object], what: str
) -> None:
    with pytest.raises(BaselineError, match=what) as caught:
        loads(broken(baseline, change), FILE)
    message = str(caught.value)
    assert message.startswith(f"{FILE} ")
    assert message.endswith(
        ": restore it from version control, or delete it and record it again with --llm-update-baselines"
    )
    assert "\n" not in message


def test_a_truncated_file_is_named_at_every_length(baseline: Baseline) -> None:
    text = dumps(baseline)
    for length in range(0, len(text) - 2, 97):
        with pytest.raises(BaselineError, match=re.escape(FILE)):
            loads(text[:length], FILE)


def test_no_json_and_other_json(baseline: Baseline) -> None:
    with pytest.raises(BaselineError, match=r"nf4-dq.json is empty: restore it"):
        loads("  \n", FILE)
    with pytest.raises(BaselineError, match=r"is not valid JSON \(line 1: "):
        loads("gpu.settled = 7", FILE)
    with pytest.raises(BaselineError, match="holds 3 where the file needs an object"):
        loads("3", FILE)


def test_a_newer_schema_says_to_upgrade(baseline: Baseline) -> None:
    with pytest.raises(BaselineError, match=r"has schema 2, but this pytest-llmload reads schemas up to 1: upgrade"):
        loads(dumps(baseline).replace('"schema": 1', '"schema": 2'), FILE)


def test_a_file_that_is_nothing_but_brackets_is_an_error_of_the_baseline() -> None:
    with pytest.raises(BaselineError, match="is nested too deeply"):
        loads("[" * 100_000, "f")


def test_merge_leftovers_are_found(baseline: Baseline) -> None:
    text = dumps(baseline)
    conflict = text.replace('    "gpu.settled"', '<<<<<<< HEAD\n    "gpu.settled"', 1)
    with pytest.raises(BaselineError, match="holds unresolved merge conflicts"):
        loads(conflict, FILE)
    twice = text.replace('    "gpu.settled"', '    "gpu.settled": 1,\n    "gpu.settled"', 1)
    with pytest.raises(BaselineError, match=r"holds 'gpu.settled' twice"):
        loads(twice, FILE)


def test_the_samples_are_real_data() -> None:
    """The fixtures of these tests have the shapes that the probes give."""
    assert len(numbers().logits) == 16
    assert stored(ENVIRONMENT)["torch"] == "2.13.0+cu128"
    assert "host" not in stored(ENVIRONMENT)
