"""``llmload accept, merge, diff, history, rename, report``: on machines that measure nothing, and in git."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from git_repository import commit, start_repository
from report_gallery import DEVICE, HOSTILE, judged, measured, report
from sample_loads import GIB, NF4

from pytest_llmload.baselines.codec import dumps, loads
from pytest_llmload.baselines.record import record
from pytest_llmload.cli import COMMANDS, main
from pytest_llmload.core.results import NOT_APPLIED, OUT_OF_MEMORY, ErrorInfo
from pytest_llmload.core.runs import Run
from pytest_llmload.reports.document import document

PATH = Path("baselines/polyglot-ko-12.8b", DEVICE, "nf4-dq.json")
OLD = measured(NF4)
REGRESSED = measured(NF4, metrics={"gpu.settled": round(7.17 * GIB), "gpu.0.settled": round(7.17 * GIB)})


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root directory of a project whose baseline is committed."""
    monkeypatch.chdir(tmp_path)
    PATH.parent.mkdir(parents=True)
    PATH.write_text(dumps(baseline_of(OLD)), encoding="utf-8")
    start_repository()
    commit("Record the model")
    return tmp_path


def baseline_of(result: Any) -> Any:
    baseline = record(None, [result], update=True).baseline
    assert baseline is not None
    return baseline


def write(*runs: Run, name: str = "run.json", **fields: Any) -> str:
    Path(name).write_text(json.dumps({**document(list(runs)), **fields}), encoding="utf-8")
    return name


def gated(result: Any = REGRESSED, **fields: Any) -> Run:
    """The load as a gating run compares it with what is committed."""
    return judged(NF4, loads(PATH.read_text(), ""), result, **fields)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(arguments) == status
    out, err = capsys.readouterr()
    return err if status == 2 else out


# --- accept ----------------------------------------------------------------------------------------------------------


def test_what_ci_measured_is_accepted_without_its_machine(capsys: pytest.CaptureFixture[str]) -> None:
    name = write(gated())
    before = PATH.read_bytes()
    assert "1 accepted (--dry-run: nothing is written)" in said(capsys, "accept", name, "--dry-run")
    assert PATH.read_bytes() == before
    out = said(capsys, "accept", name)
    assert f"{PATH}\n  accepted  gpu.settled  6.64 GiB -> 7.17 GiB  (+8.0 %)\n" in out
    assert out.endswith("\n1 accepted\n")
    now = loads(PATH.read_text(), "")
    assert now.memory["gpu.settled"] == round(7.17 * GIB)
    assert now.memory["gpu.load_peak"] == OLD.metrics["gpu.load_peak"], "what did not move keeps its value"
    assert gated().verdict in ("ok", "inconclusive")
    assert said(capsys, "accept", name) == "1 as recorded already\n"


def test_a_new_load_is_written_as_the_plugin_would(capsys: pytest.CaptureFixture[str]) -> None:
    PATH.unlink()
    out = said(capsys, "accept", write(judged(NF4, None, OLD)))
    assert f"{PATH}\n  new  gpu.weights 6.64 GiB, weights.logical 6.64 GiB, " in out
    assert re.search(r" and \d+ more\n1 new\n$", out)
    assert PATH.read_text() == dumps(baseline_of(OLD))


def test_of_a_variant_the_files_of_the_variant_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    nightly = PATH.parent / "nightly" / PATH.name
    said(capsys, "accept", write(dataclasses.replace(judged(NF4, None, OLD), baseline=str(nightly))))
    assert nightly.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"outcome": NOT_APPLIED}, "the load failed: not applied"),
        ({"digests": {"shape": "another" * 9, "weights": "3e1f" * 16}}, "--replace records it again"),
        ({"digests": {}}, "the report does not identify the model: it lacks a digest of its"),
    ],
)
def test_what_the_plugin_would_not_record_is_refused(
    capsys: pytest.CaptureFixture[str], change: dict[str, Any], says: str
) -> None:
    before = PATH.read_bytes()
    run = dataclasses.replace(gated(), result=dataclasses.replace(REGRESSED, **change))
    assert says in said(capsys, "accept", write(run), status=1)
    assert PATH.read_bytes() == before


def test_another_shape_is_replaced_when_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    digests = {"shape": "another" * 9, "weights": "3e1f" * 16}
    other = measured(NF4, digests=digests)
    said(capsys, "accept", "--replace", write(judged(NF4, loads(PATH.read_text(), ""), other)))
    assert loads(PATH.read_text(), "").shape == digests["shape"]


def test_one_refusal_does_not_stop_the_others_and_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    broken = dataclasses.replace(NF4, quant="fp4")
    failed = Run(broken, DEVICE, dataclasses.replace(measured(broken), outcome=NOT_APPLIED), outcome="fail")
    out = said(capsys, "accept", write(gated(), failed), status=1)
    assert out.splitlines()[-2:] == [f"{broken.id}: refused, the load failed: not applied", "1 accepted, 1 refused"]
    assert loads(PATH.read_text(), "").memory["gpu.settled"] == round(7.17 * GIB)
    assert not (PATH.parent / "fp4-dq.json").exists()


def test_reports_of_newer_releases_and_hostile_ones_write_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    files = {path: path.read_bytes() for path in Path().rglob("*.json")}
    assert "schema 2" in said(capsys, "accept", write(gated(), schema=2), status=2)
    for name in ("../../etc", "..", "a/b", ""):
        run = dataclasses.replace(gated(), spec=dataclasses.replace(NF4, name=name))
        assert "nothing was written" in said(capsys, "accept", write(run), status=2)
    run = gated(device_key="../x")
    assert "nothing was written" in said(capsys, "accept", write(run), status=2)
    Path("run.json").unlink()
    assert {path: path.read_bytes() for path in Path().rglob("*.json")} == files


def test_times_of_all_processes_are_accepted_and_wrong_ones_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    slow = measured(NF4, samples={"load": [20.0, 20.1], "ttft": [0.09, 0.091], "per_token": [0.05, 0.051]})
    run = gated(slow)
    said(capsys, "accept", write(run))
    (times,) = loads(PATH.read_text(), "").time.values()
    assert times["ttft"].median == pytest.approx(0.0905)
    run.times["ttft"] = {"median": -1, "samples": [[1.0]]}
    assert "ttft" in said(capsys, "accept", write(run), status=1)


def test_one_load_of_a_report_is_accepted_by_its_id(capsys: pytest.CaptureFixture[str]) -> None:
    name = write(gated())
    assert "does not have the load 'other'" in said(capsys, "accept", name, "--load", "other", status=2)
    assert "accepted" in said(capsys, "accept", name, "--load", NF4.id)


# --- history, diff ---------------------------------------------------------------------------------------------------


def test_history_shows_the_step_and_follows_a_rename(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "accept", write(gated()))
    Path("run.json").unlink()
    commit("Accept the larger absmax")
    said(capsys, "rename", "polyglot-ko-12.8b", "polyglot")
    commit("Rename the model")
    out = said(capsys, "history", "gpu.settled", "--svg", "h.svg")
    assert out.count(" on nvidia-h100") == 1, "a renamed model has one history"
    assert "polyglot / nf4-dq" in out
    assert "Record the model" in out
    assert "7.17 GiB" in out
    assert "+8.0 %" in out
    assert "Accept the larger absmax" in out
    assert "▁█" in out
    root = ET.parse("h.svg").getroot()
    assert len(root.findall(".//{http://www.w3.org/2000/svg}circle")) == 2
    (PATH.parents[2] / "polyglot" / DEVICE / "nf4-dq.json").unlink()
    commit("Drop it")
    assert "gone" in said(capsys, "history", "gpu.settled")
    assert "unknown metric" in said(capsys, "history", "gpu.nonsense", status=2)
    assert "no commit has" in said(capsys, "history", "kv_cache.tokens", status=2)


def test_a_broken_commit_is_a_hole_in_history(capsys: pytest.CaptureFixture[str]) -> None:
    good = PATH.read_text()
    PATH.write_text(good[:50])
    commit("Break it")
    PATH.write_text(good)
    commit("Mend it")
    assert said(capsys, "history", "gpu.settled").count("6.64 GiB") == 2


def test_revisions_folders_and_reports_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    name = write(gated())
    out = said(capsys, "diff", "HEAD", name, status=1)
    assert "gpu.settled  6.64 GiB -> 7.17 GiB  (+8.0 %, tolerance 2 MiB)" in out
    assert "1 of 1 load differs" in out
    said(capsys, "accept", name)
    assert "gpu.load_peak" not in said(capsys, "diff", "HEAD", "baselines", status=1)
    assert "gpu.load_peak" in said(capsys, "diff", "HEAD", "baselines", "--all", status=1)
    assert "0 of 1 load differ" in said(capsys, "diff", "baselines", "baselines")
    found = json.loads(said(capsys, "diff", "HEAD", "baselines", "--json", status=1))
    assert {row["name"] for row in found[0]["rows"] if row["kind"] == "moved"} == {"gpu.settled"}
    for bad in ("nowhere", "--output=x", "HEAD~9"):
        assert "is not a file, a folder or a git revision" in said(capsys, "diff", "--", bad, "HEAD", status=2)
    assert not Path("x").exists()


def test_a_load_that_failed_is_not_one_that_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    error = ErrorInfo("CUDA out of memory", "torch.OutOfMemoryError")
    dead = dataclasses.replace(measured(NF4), outcome=OUT_OF_MEMORY, error=error)
    red = write(Run(NF4, DEVICE, dead, outcome="fail"), name="red.json")
    reason = "the load failed: out of memory: torch.OutOfMemoryError: CUDA out of memory"
    out = said(capsys, "diff", "HEAD", red, status=1)
    assert out.splitlines()[0].endswith(f" on {DEVICE}: NEW: {reason}")
    assert f"OLD: {reason}" in said(capsys, "diff", red, "HEAD", status=1)
    assert said(capsys, "diff", red, red) == "0 of 1 load differ\n"


def test_the_time_of_one_load_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    slow = measured(NF4, samples={"load": [99.0]}, metrics={"load": 99.0})
    one = write(judged(NF4, None, measured(NF4)), name="one.json")
    two = write(judged(NF4, None, slow), name="two.json")
    assert said(capsys, "diff", one, two) == "0 of 1 load differ\n"
    assert "99.00 s" in said(capsys, "diff", one, two, "--all")


# --- merge, report, rename -------------------------------------------------------------------------------------------


def test_a_matrix_of_gpus_is_one_report(capsys: pytest.CaptureFixture[str]) -> None:
    a100 = judged(NF4, None, OLD, device_key="nvidia-a100-sxm4-80gb")
    one = write(gated(), name="h100.json", stale=["baselines/x/y/z.json", str(PATH)])
    two = write(a100, gated(OLD), name="a100.json")
    out = said(capsys, "merge", one, two, "-o", "all.json", "-o", "all.md", status=1)
    head, line = (row for row in out.splitlines() if not row.startswith("wrote"))
    assert head.split() == ["load", DEVICE, "nvidia-a100-sxm4-80gb"]
    assert line.split()[-2:] == ["regressed", "missing"]
    merged = json.loads(Path("all.json").read_text())
    assert len(merged["runs"]) == 2
    assert merged["stale"] == ["baselines/x/y/z.json"], "a baseline that one of the jobs used is not stale"
    assert "2 of 2 loads failed" in Path("all.md").read_text()


def test_a_report_is_made_into_another_later(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.json").write_text(json.dumps(report(HOSTILE)))
    said(capsys, "report", "run.json", "a.html", "a.md", "gl.codequality.json")
    assert Path("a.html").read_text().startswith("<!doctype html>")
    assert json.loads(Path("gl.codequality.json").read_text())[0]["check_name"]
    assert "one of .json" in said(capsys, "report", "run.json", "b.md", "a.pdf", status=2)
    assert not Path("b.md").exists()


def test_a_rename_moves_all_files_or_none(capsys: pytest.CaptureFixture[str]) -> None:
    other = Path("baselines/new", *PATH.parts[2:])
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    assert "exists already" in said(capsys, "rename", "polyglot-ko-12.8b", "new", status=2)
    assert PATH.exists()
    assert "does not exist" in said(capsys, "rename", "nothing", "new", status=2)
    assert "cannot be a model name" in said(capsys, "rename", "..", "new", status=2)
    text = PATH.read_text()
    said(capsys, "rename", "polyglot-ko-12.8b", "other")
    assert not PATH.parents[1].exists()
    assert Path("baselines/other", *PATH.parts[2:]).read_text() == text


def test_every_command_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert len(capsys.readouterr().out.splitlines()) > 5
