"""``llmload``: baselines outside a test run. Its report comes from CI, and may hold anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sample_loads import baseline_of, load

from pytest_llmload.baselines.codec import dumps
from pytest_llmload.cli import main

STALE = "baselines/org--model/cpu-x86_64/nf4.json"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root directory with two baselines, and a file that is not a baseline."""
    text = dumps(baseline_of(None, [load()], update=True))
    for name in (STALE, "baselines/org--model/cpu-x86_64/nightly/nf4.json"):
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "important.txt").write_text("mine")
    (tmp_path / "important.json").write_text(text)
    (tmp_path / "project" / "package.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def report(folder: Path, *stale: str, **entries: Any) -> str:
    path = folder / "run.json"
    path.write_text(json.dumps({"schema": 1, "runs": [], "stale": stale, "notes": [], **entries}), encoding="utf-8")
    return str(path)


def files(folder: Path) -> set[Path]:
    return {path for path in folder.parent.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command said: one sentence on stderr, and nothing else."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("llmload: ")
    assert err.count("\n") == 1
    return err


def test_what_a_report_calls_stale_is_deleted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(folder)
    text = report(folder, STALE, STALE, "baselines/org--model/cpu-x86_64/nightly/nf4.json", notes=["déjà vu"])
    assert main(["prune", text, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"would delete {STALE}",
        "would delete baselines/org--model/cpu-x86_64/nightly/nf4.json",
    ]
    assert files(folder) == before | {folder / "run.json"}
    assert main(["prune", text]) == 0
    assert capsys.readouterr().out.startswith(f"deleted {STALE}\n")
    assert not list((folder / "baselines").rglob("*.json"))


def test_pruning_where_nothing_is_stale_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", report(folder)]) == 0
    assert capsys.readouterr().out == "nothing is stale\n"


def test_baselines_in_a_folder_of_another_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "baselines").rename(folder.parent / "elsewhere")
    stale = folder.parent / "elsewhere" / "org--model" / "cpu-x86_64" / "nf4.json"
    assert "--baselines" in refused(capsys, "prune", report(folder, str(stale)))
    assert main(["prune", report(folder, str(stale)), "--baselines", str(folder.parent / "elsewhere")]) == 0
    assert not stale.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../important.txt",
        "../important.json",
        "package.json",
        "baselines/../../important.json",
        "baselines/important.json",
        "baselines/org--model/cpu-x86_64",
        "baselines/org--model/cpu-x86_64/gone.json",
        "baselines/org--model/cpu-x86_64/notes.txt",
        "baselines/org--model/cpu-x86_64/broken.json",
        "baselines/org--model/cpu-x86_64/link.json",
        "baselines/org--model/cpu-x86_64/a/b/deep.json",
        "baselines/org--model/cpu-x86_64/nul\0.json",
        "",
    ],
)
def test_a_report_that_names_anything_else_deletes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    inside = folder / "baselines" / "org--model" / "cpu-x86_64"
    text = (folder / STALE).read_text()
    (folder / "baselines" / "important.json").write_text(text)
    (inside / "notes.txt").write_text(text)
    (inside / "broken.json").write_text(text[:100])
    (inside / "link.json").symlink_to(folder.parent / "important.json")
    (inside / "a" / "b").mkdir(parents=True)
    (inside / "a" / "b" / "deep.json").write_text(text)
    path = report(folder, STALE, name)
    before = files(folder)
    refused(capsys, "prune", path)
    assert files(folder) == before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not a report"),
        (b'{"schema": 1, "stale": ["bas', "is not a report"),
        (b"\xff\xfe", "is not a report"),
        (b"[" * 200_000, "is not a report"),
        (b"[]", "is not a report"),
        (b'{"stale": []}', "is not a report"),
        (b'{"schema": 1}', "is not a report"),
        (b'{"schema": true, "stale": []}', "is not a report"),
        (b'{"schema": 1, "stale": "baselines"}', "is not a report"),
        (b'{"schema": 1, "stale": [7]}', "is not a report"),
        (b'{"schema": 2, "stale": []}', "schema 2"),
    ],
)
def test_what_is_no_report_is_refused_in_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], content: bytes, says: str
) -> None:
    (folder / "run.json").write_bytes(content)
    assert says in refused(capsys, "prune", "run.json")


def test_a_report_or_a_baseline_that_cannot_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot read" in refused(capsys, "prune", "nowhere.json")
    assert "cannot read" in refused(capsys, "prune", ".")
    assert "cannot read" in refused(capsys, "show", ".")
    assert "does not exist" in refused(capsys, "show", "nowhere.json")


def test_a_baseline_that_cannot_be_deleted(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, **_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", denied)
    assert "cannot delete" in refused(capsys, "prune", report(folder, STALE))


def test_a_baseline_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", STALE]) == 0
    out = capsys.readouterr().out
    assert "gpu.settled " in out
    assert "6.64 GiB" in out


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert "prune" in out
    assert "show" in out
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("llmload ")


def test_a_reader_that_has_seen_enough_is_no_error(folder: Path) -> None:
    command = [sys.executable, "-m", "pytest_llmload.cli", "show", STALE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
