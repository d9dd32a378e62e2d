"""What people and programs read: failure texts, the summary, JSON, and JUnit."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sample_loads import ENVIRONMENT, GIB, METRICS, MIB, NF4, baseline_of, load, manifest

from pytest_llmload.baselines.compare import compare
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.core.results import NOT_APPLIED, OUT_OF_MEMORY, ErrorInfo, LoadResult, ManifestRow, Problem
from pytest_llmload.core.runs import Run, Subject
from pytest_llmload.core.spec import LoadSpec, Workload
from pytest_llmload.core.units import Tolerance
from pytest_llmload.core.verdicts import ERROR, FAIL, SKIP, Comparison, ManifestChange, MetricVerdict
from pytest_llmload.reports import formats
from pytest_llmload.reports.document import document
from pytest_llmload.reports.failure import (
    budget_text,
    ceiling_text,
    comparison_text,
    load_failure_text,
    not_applied_text,
)
from pytest_llmload.reports.junit import properties
from pytest_llmload.reports.prediction import origins
from pytest_llmload.reports.terminal import summary, tokens_per_second

DEVICE = "nvidia-h100-80gb-hbm3"
SUBJECT = Subject("polyglot-ko-12.8b", "nf4-dq", DEVICE)
ACCEPT = "pytest tests/test_memory.py --llm-update-baselines"
PLAIN = "nf4 absmax=float32 block=64 compute=bf16"
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def baseline() -> Baseline:
    return baseline_of(None, [load(), load()], update=True)


def environment(**changes: str) -> dict[str, str]:
    return {**ENVIRONMENT, **changes}


def lines(text: str) -> list[str]:
    return text.splitlines()


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_regression_says_what_moved_why_and_how_to_accept_it(baseline: Baseline) -> None:
    new = load(
        metrics={"gpu.settled": round(7.17 * GIB)},
        manifest=manifest(PLAIN, 43 * MIB),
        environment=environment(bitsandbytes="0.50.2"),
    )
    assert comparison_text(SUBJECT, compare(baseline, new), ACCEPT) == (
        "memory regressed: polyglot-ko-12.8b / nf4-dq on nvidia-h100-80gb-hbm3\n"
        "  gpu.settled  6.64 GiB -> 7.17 GiB  (+8.0 %, tolerance 2 MiB)\n"
        "  because      160 x Linear4bit: double quant dropped, absmax uint8 -> float32 (+480.00 MiB)\n"
        "  changed      bitsandbytes 0.50.1 -> 0.50.2\n"
        "  accept       pytest tests/test_memory.py --llm-update-baselines"
    )


def test_what_a_prediction_finds_to_allocate_more_stands_in_the_rows(baseline: Baseline) -> None:
    kept = ["aten.empty", "a.py:1 f", 4 * MIB, 2, 4 * MIB]
    now, base = {"load": [["aten.clone.default", "ourapp.py:5 load", MIB, 1, MIB], kept]}, {"load": [kept]}
    more = origins(["gpu.load_peak"], now, base, "main")
    assert more == ["1.00 MiB more than main at the peak of the load: aten.clone.default at ourapp.py:5 load"]
    assert origins(["gpu.load_peak"], base, now, "main") == ["no place of the load allocates more than at main"]
    assert origins(["gpu.load_allocated"], base, None, "") == [
        "4.00 MiB in total over the load: aten.empty at a.py:1 f"
    ]
    new = load(metrics={"gpu.load_peak": 10 * GIB}, environment=environment(bitsandbytes="0.50.2"))
    text = lines(comparison_text(SUBJECT, compare(baseline, new), ACCEPT, allocates=more))
    assert f"  allocates      {more[0]}" in text
    assert text[-2:] == ["  changed        bitsandbytes 0.50.1 -> 0.50.2", f"  accept         {ACCEPT}"]


def test_columns_are_aligned_and_small_changes_are_not_hidden(baseline: Baseline) -> None:
    new = load(
        metrics={
            "gpu.weights": METRICS["gpu.weights"] + 512,
            "gpu.load_allocations": METRICS["gpu.load_allocations"] + 1,
            "host.weights": 4096,
            "gpu.load_peak": 8 * GIB,
        }
    )
    text = lines(comparison_text(SUBJECT, compare(baseline, new), ACCEPT))
    assert text[1:5] == [
        "  gpu.weights           6.64 GiB -> 6.64 GiB  (+512 B, exact)",
        "  host.weights          0 B -> 4.00 KiB       (+4.00 KiB, exact)",
        "  gpu.load_allocations  1,234 -> 1,235        (+1, exact)",
        "  gpu.load_peak         9.00 GiB -> 8.00 GiB  (-11.1 %, tolerance 1 % or 2 MiB, improved)",
    ]


def test_changed_modules_without_a_metric_that_moved(baseline: Baseline) -> None:
    text = comparison_text(SUBJECT, compare(baseline, load(manifest=manifest(PLAIN))), ACCEPT)
    assert lines(text) == [
        f"memory changed: {SUBJECT}",
        "  modules  160 x Linear4bit: double quant dropped, absmax uint8 -> float32",
        f"  accept   {ACCEPT}",
    ]


def test_changed_numbers_name_the_buffer(baseline: Baseline) -> None:
    numbers = dataclasses.replace(load().numbers, buffers={"gpt_neox.rotary_emb.inv_freq": [4.5, 1.3]})
    text = comparison_text(SUBJECT, compare(baseline, load(numbers=numbers)), ACCEPT)
    assert lines(text)[:2] == [
        f"memory changed: {SUBJECT}",
        "  numbers  gpt_neox.rotary_emb.inv_freq values changed",
    ]


def test_long_lists_end_on_the_first_screen() -> None:
    changes = tuple(ManifestChange(f"module.{number}: cuda:0 -> cpu", 1, 0) for number in range(300))
    metrics = tuple(MetricVerdict(f"gpu.{number}.settled", "regressed", 1e9, 2e9, "B") for number in range(64))
    text = lines(comparison_text(SUBJECT, Comparison("memory", "changed", metrics=metrics, manifest=changes), ACCEPT))
    assert len(text) < 24
    assert "and 52 more metrics" in text[13]
    assert text[-2].strip() == "and 294 more"
    assert text[-1].endswith(ACCEPT)


def test_a_missing_baseline_prints_the_command_that_records() -> None:
    text = comparison_text(
        SUBJECT, compare(None, load()), ACCEPT, file="baselines/m/d/nf4-dq.json", elsewhere=["nvidia-a100-sxm4-80gb"]
    )
    assert lines(text) == [
        f"memory baseline missing: {SUBJECT}",
        "  because    nothing is recorded for this load",
        "  file       baselines/m/d/nf4-dq.json",
        "  elsewhere  recorded for nvidia-a100-sxm4-80gb",
        f"  record     {ACCEPT}",
    ]


def test_a_missing_metric_says_what_was_measured() -> None:
    without = baseline_of(None, [load(metrics={"gpu.process": None})], update=True)
    text = comparison_text(SUBJECT, compare(without, load()), ACCEPT)
    assert lines(text)[0] == f"memory baseline incomplete: {SUBJECT}"
    assert lines(text)[1] == "  gpu.process  missing in the baseline (now 11.00 GiB)"
    assert lines(text)[-1] == f"  record       {ACCEPT}"


def test_an_incomparable_baseline_names_both_sides(baseline: Baseline) -> None:
    text = comparison_text(SUBJECT, compare(baseline, load(dataclasses.replace(NF4, quant="fp4"))), ACCEPT)
    assert lines(text)[:2] == [
        f"memory baseline incomparable: {SUBJECT}",
        '  because  different spec: quant is "nf4" in the baseline and "fp4" now',
    ]


@pytest.mark.parametrize(
    ("change", "head", "line"),
    [
        ({"environment": environment(driver="570")}, "memory incomparable", "gpu.process  driver 560.28.03 -> 570"),
        ({"metrics": {"gpu.process": None}}, "memory unavailable", "gpu.process  not measured by this load"),
    ],
)
def test_strict_failures_say_what_could_not_be_judged(
    baseline: Baseline, change: dict[str, Any], head: str, line: str
) -> None:
    text = comparison_text(SUBJECT, compare(baseline, load(**change)), ACCEPT)
    assert text.startswith(f"{head}: ")
    assert line in text


def test_what_was_not_measured_is_nothing_that_a_command_accepts(baseline: Baseline) -> None:
    new = compare(baseline, load(metrics={"gpu.weights": None, "gpu.0.weights": None}))
    text = lines(comparison_text(SUBJECT, new, ACCEPT, file="b.json"))
    assert text[0].startswith("memory unavailable: ")
    assert text[1].split(maxsplit=1) == ["gpu.weights", "not measured by this load"]
    assert text[2].split() == ["file", "b.json"]
    assert text[3].split(maxsplit=1)[0] == "remedy"
    assert "delete the entry from the file" in text[3]
    assert ACCEPT not in "\n".join(text)


def test_a_failure_of_times_is_called_latency(baseline: Baseline) -> None:
    text = comparison_text(SUBJECT, compare(baseline, load(), section="time"), ACCEPT)
    assert lines(text)[0] == f"latency inconclusive: {SUBJECT}"
    assert lines(text)[1] == "  load       too few processes to tell (12.31 s -> 12.31 s)"


def test_what_was_not_applied() -> None:
    names = tuple(f"model.layers.{number}.mlp.experts.gate_up_proj (512.00 MiB)" for number in range(32))
    problem = Problem(
        "quantised",
        "only 9.7 % of the quantisable weights are nf4: 32 weights (16.00 GiB) are dense: experts are no Linear",
        names,
        16 * GIB,
        'quant("nf4", dense_ok=["*.experts.*"]) accepts them',
    )
    finite = Problem("finite", "12 of 4096 logits are not finite")
    result = load(outcome=NOT_APPLIED, problems=[problem, finite], notes=["4 parameters are float32"])
    assert lines(not_applied_text(Subject("tiny-mixtral", "nf4", "cpu-x86_64"), result)) == [
        "nf4 was not applied: tiny-mixtral / nf4 on cpu-x86_64",
        f"  quantised  {problem.message}",
        f"               {', '.join(names[:4])} and 28 more",
        f"  hint       {problem.hint}",
        "  finite     12 of 4096 logits are not finite",
        "  note       4 parameters are float32",
    ]


def test_what_does_not_run_was_applied_all_the_same() -> None:
    raised = Problem("generate", "the model does not run: AssertionError: no kernel (bitsandbytes/functional.py:1696)")
    subject = Subject("tiny", "nf4", "cpu-x86_64")
    alone = not_applied_text(subject, load(outcome=NOT_APPLIED, problems=[raised]))
    assert lines(alone) == ["does not run: tiny / nf4 on cpu-x86_64", f"  generate  {raised.message}"]
    both = load(outcome=NOT_APPLIED, problems=[Problem("quantised", "nothing was quantised to nf4"), raised])
    assert lines(not_applied_text(subject, both))[0] == "nf4 was not applied: tiny / nf4 on cpu-x86_64"


def test_ceilings_and_budgets_are_one_sentence() -> None:
    assert ceiling_text(SUBJECT, "gpu.1", 9.5 * GIB, 9 * GIB, phase="generate") == (
        "memory ceiling exceeded: GPU 1 held 9.50 GiB while generating, 512.00 MiB over the ceiling of 9.00 GiB "
        f"({SUBJECT})"
    )
    assert ceiling_text(SUBJECT, "host", 2 * GIB, GIB).startswith(
        "memory ceiling exceeded: the host held 2.00 GiB, 1.00"
    )
    assert budget_text(SUBJECT, "per_token", 0.0271, 0.025, samples=31) == (
        f"latency budget exceeded: per_token is 27.1 ms (median of 31 samples), over the budget of 25.0 ms ({SUBJECT})"
    )
    assert " is 27.1 ms (1 sample), over " in budget_text(SUBJECT, "load", 0.0271, 0.025)
    assert " (median of 5 processes), over " in budget_text(SUBJECT, "ttft", 0.0271, 0.025, samples=9, processes=5)
    assert "over the budget of 26.4 ms, +10 % over the recorded 24.0 ms (" in budget_text(
        SUBJECT, "per_token", 0.0271, 0.0264, recorded=0.024
    )


# --- summary ---------------------------------------------------------------------------------------------------------


def run(
    spec: LoadSpec = NF4, result: LoadResult | None = None, comparisons: Iterable[Comparison] = (), **changes: Any
) -> Run:
    return Run(spec, DEVICE, result or load(spec), list(comparisons), **changes)


LORA = dataclasses.replace(NF4, adapter="random", workload=Workload(8, 2048, 64), own_workload=True)


def test_longer_texts_stay_in_their_column() -> None:
    result = load(outcome=OUT_OF_MEMORY, error=ErrorInfo("first\nsecond", "RuntimeError", phase="load"), notes=["a\nb"])
    assert lines(load_failure_text(SUBJECT, result))[1:4] == [
        "  because  RuntimeError: first",
        "           second",
        "  phase    load",
    ]
    told = summary([Run(NF4, DEVICE, result)], width=100)
    assert told[told.index("notes:") + 1 :] == [f"  {NF4.id}: a", "    b"]
    assert "  because  MemoryError\n" in load_failure_text(
        SUBJECT, load(outcome=OUT_OF_MEMORY, error=ErrorInfo("", "MemoryError", phase="load"))
    )


def test_the_summary_table() -> None:
    assert summary([run(comparisons=[Comparison("memory", "ok")]), run(LORA)], width=120) == [
        f"polyglot-ko-12.8b on {DEVICE}",
        "  variant                  weights   settled  load peak  gen peak     load     ttft  tokens/s  verdict",
        "  nf4-dq                  6.64 GiB  6.64 GiB   9.00 GiB  6.89 GiB  12.31 s  41.2 ms      39.8  ok",
        "  nf4-dq+lora+w8x2048-64  6.64 GiB  6.64 GiB   9.00 GiB  6.89 GiB  12.31 s  41.2 ms     318.7  measured",
    ]


def test_a_cpu_run_shows_host_figures() -> None:
    metrics = {name: value for name, value in METRICS.items() if not name.startswith("gpu.")}
    cpu = Run(NF4, "cpu-x86_64", load(metrics={**dict.fromkeys(METRICS), **metrics, "host.weights": 5 * MIB}))
    table = summary([cpu], width=100)
    assert table[1].split() == ["variant", "weights", "settled", "peak", "load", "ttft", "tokens/s", "verdict"]
    assert table[2].split()[1:7] == ["5.00", "MiB", "300.00", "MiB", "900.00", "MiB"]


@pytest.mark.parametrize("width", range(24, 140, 4))
def test_the_table_fits_the_terminal_and_keeps_the_verdict(width: int) -> None:
    skipped = Run(dataclasses.replace(NF4, quant="int8"), DEVICE, outcome=SKIP)
    table = summary([run(comparisons=[Comparison("memory", "regressed")]), run(LORA), skipped], width=width)[1:]
    assert max(map(len, table)) <= width
    if width >= 36:
        assert [line.split()[-1] for line in table] == ["verdict", "regressed", "measured", "skipped"]


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_every_column_is_there_at_80(device: str, served: bool) -> None:
    host = {name: value for name, value in METRICS.items() if not name.startswith("gpu.")}
    figures = {} if device == "gpu" else {**dict.fromkeys(METRICS), **host}
    figures |= {"server.peak": 999.99 * MIB} if served else {}
    tight = dataclasses.replace(NF4, quant="int8", double_quant=False)
    runs = [
        run(LORA, load(metrics=figures), [Comparison("memory", "incomparable", whole=True)]),
        run(tight, load(tight, metrics={**figures, "host.peak": 1023.99 * MIB}), [Comparison("memory", "regressed")]),
    ]
    _, head, *rows = summary(runs, width=80)
    assert max(map(len, (head, *rows))) <= 80
    peaks = ["load", "pk", "gen", "pk"] if device == "gpu" else ["peak"]
    peaks += ["srv", "pk"] if served else []
    assert head.split()[1:] == ["weights", "settled", *peaks, "load", "ttft", "tok/s", "verdict"]
    assert rows[0].split()[-4:] == ["12.31s", "41.2ms", "318.7", "incomparable"]
    assert rows[1].split()[0].startswith("int8")


def test_tokens_per_second_count_the_batch() -> None:
    assert tokens_per_second(run(LORA)) == pytest.approx(8 / METRICS["per_token"])
    assert tokens_per_second(run(result=load(metrics={"per_token": None}))) is None


def test_what_a_person_has_to_know_is_listed_once(baseline: Baseline) -> None:
    better = compare(baseline, load(metrics={"gpu.settled": METRICS["gpu.settled"] - 310 * MIB}))
    other = load(environment=environment(driver="570.1"))
    runs = [
        run(comparisons=[better]),
        run(LORA, comparisons=[compare(baseline, other)]),
        run(dataclasses.replace(NF4, quant="fp4"), comparisons=[compare(baseline, other)]),
        run(accepted=["gpu.settled", "manifest"], baseline="baselines/a.json", comparisons=[better]),
        run(recorded=["a", "b", "c", "d", "e"], baseline="baselines/b.json"),
    ]
    for item in runs:
        assert item.result is not None
        item.result.notes.append("4 parameters are float32")
    text = "\n".join(summary(runs, width=100, stale=["baselines/old.json"], notes=["page cache uncontrolled"]))
    assert text.count("leaves 310.00 MiB of slack") == 1
    assert "accepted:\n  baselines/a.json: gpu.settled, manifest\n" in text
    assert "recorded:\n  baselines/b.json: a, b, c and 2 more\n" in text
    both = f"{LORA.id}, {dataclasses.replace(NF4, quant='fp4').id}"
    assert f"  {both}: gpu.process, gpu.context incomparable, driver 560.28.03 -> 570.1\n" in text
    assert "stale baselines (not used by any test in this run):\n  baselines/old.json\n" in text
    assert text.count("page cache uncontrolled") == text.count("4 parameters are float32") == 1
    assert lines(text)[5].endswith(" accepted")


def test_an_improved_time_says_what_it_was_judged_by() -> None:
    """The host may have been slower all the while: the times alone can point the other way."""
    reason = "of the control's, 0.88 times the baseline's (0.85 to 0.91)"
    faster = MetricVerdict("ttft", "improved", 0.0218, 0.0224, "s", Tolerance(0.1), reason)
    text = "\n".join(summary([run(comparisons=[Comparison("time", "improved", metrics=(faster,))])], width=100))
    assert f"ttft 21.8 ms -> 22.4 ms: {reason}" in text
    assert "slack" not in text


def test_long_lists_are_cut() -> None:
    text = summary([], width=80, stale=[f"baselines/{number}.json" for number in range(40)])
    assert len(text) == 12
    assert text[-1] == "  and 30 more"


def test_a_text_of_several_lines_is_one_entry() -> None:
    text = summary([run(messages=["over\n  because  of it"])], width=100)
    assert text[3:] == ["notes:", f"  {NF4.id}: over", "      because  of it"]


def test_a_run_without_loads_says_nothing() -> None:
    assert summary([], width=80) == []


# --- programs --------------------------------------------------------------------------------------------------------


def full_run(baseline: Baseline) -> Run:
    spec = dataclasses.replace(NF4, env=(("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwx"),))
    result = load(
        spec,
        metrics={"gpu.settled": 8 * GIB, "gpu.process": math.nan},
        manifest=manifest(PLAIN, 43 * MIB),
        problems=[Problem("keys", "1 tensor is missing", ("lm_head.weight",), 7, "keys_ok")],
        error=ErrorInfo("it broke", log="token hf_abcdefghijklmnopqrstuvwx"),
        ledger=[{"weights": 1.0}],
        phases={"load": 12.3},
        phase_peaks={"load": {"gpu.0": 9.0 * GIB}},
        unavailable={"gpu.process": "no"},
        notes=["a note"],
    )
    comparison = compare(baseline, dataclasses.replace(result, spec=NF4.to_json()))
    run = Run(spec, DEVICE, result, [comparison], ["tests/test_a.py::test_a[x]"], FAIL)
    return dataclasses.replace(run, over_limits=["over"], baseline="b.json")


def test_the_report_holds_what_was_measured_and_said(baseline: Baseline, tmp_path: Path) -> None:
    path = tmp_path / "out" / "x.json"
    runs = [full_run(baseline), Run(NF4, DEVICE, outcome=SKIP, messages=["2 GPUs"])]
    formats.write(path, document(runs, stale=["s"], notes=["n"]))
    data = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    first, second = data["runs"]
    assert (data["schema"], data["stale"], data["notes"]) == (1, ["s"], ["n"])
    assert (first["page_cache"], second["page_cache"]) == ("warm", "")
    assert (first["verdict"], first["outcome"], first["device"]) == ("regressed", "fail", DEVICE)
    assert first["metrics"]["gpu.settled"] == 8 * GIB
    assert first["metrics"]["gpu.process"] is None
    memory = first["verdicts"]["memory"]
    assert memory["metrics"]["gpu.settled"]["verdict"] == "regressed"
    assert memory["metrics"]["gpu.settled"]["baseline"] == METRICS["gpu.settled"]
    assert memory["manifest"][0]["bytes"] == 480 * MIB
    assert ManifestRow(**first["manifest"][0]) == manifest(PLAIN, 43 * MIB)[0]
    assert first["samples"]["load"] == [12.4, 12.31, 12.2]
    assert (second["verdict"], second["load"], second["messages"]) == ("skipped", "", ["2 GPUs"])
    assert "hf_abc" not in path.read_text()


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    baseline: Baseline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    formats.write(path, document([]))
    before = path.read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        formats.write(path, document([full_run(baseline)]))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def keys(value: dict[str, Any]) -> Iterator[str]:
    """Names of entries at every level, without the names of metrics, options and versions."""
    free = {"metrics", "unavailable", "samples", "phase_peaks", "phases", "environment", "digests", "spec", "verdicts"}
    for name, item in value.items():
        yield name
        items = item.values() if name in free and isinstance(item, dict) else [item]
        for child in [child for entry in items for child in (entry if isinstance(entry, list) else [entry])]:
            if isinstance(child, dict) and not (name in free and name not in ("metrics", "verdicts")):
                yield from keys(child)


def test_every_entry_of_the_report_is_documented(baseline: Baseline) -> None:
    text = (DOCS / "report-schema.md").read_text()
    documented = set(re.findall(r"`([a-z_]+)`", text))
    names = set(keys(document([full_run(baseline)])))
    # What stands in the ledger and which buffers there are is the probes' affair.
    assert {name for name in names - documented if "." not in name} - {"weights"} == set()
    assert {"because", "tolerance", "absolute", "hint", "logsumexp", "traceback"} <= names


def test_junit_properties_are_plain(baseline: Baseline) -> None:
    pairs = properties(full_run(baseline))
    found = dict(pairs)
    assert len(found) == len(pairs)
    assert str(found["llmload.spec"]).startswith("polyglot-ko-12.8b-nf4-dq")
    assert found["llmload.verdict"] == "regressed"
    assert found["llmload.gpu.settled"] == 8 * GIB
    assert isinstance(found["llmload.gpu.settled"], int)
    assert found["llmload.load"] == 12.31
    assert "llmload.gpu.process" not in found
    assert {type(value) for value in found.values()} <= {str, int, float}
    assert dict(properties(Run(NF4, DEVICE, outcome=ERROR)))["llmload.verdict"] == "machine"
    assert dict(properties(run(result=load(outcome=OUT_OF_MEMORY))))["llmload.verdict"] == OUT_OF_MEMORY
