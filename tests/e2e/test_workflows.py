"""The workflows in docs/ci: valid for their systems, and every step of theirs run in the order of a job."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from serving_project import SERVING, TESTS

DOCS = Path(__file__).parents[2] / "docs" / "ci"
GITHUB = sorted((DOCS / "github").glob("*.yml"))
GITLAB = DOCS / "gitlab" / "gitlab-ci.yml"


def read(path: Path) -> dict[Any, Any]:
    loaded: dict[Any, Any] = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize(
    ("schema", "path"),
    [*(("vendor.github-workflows", path) for path in GITHUB), ("vendor.gitlab-ci", GITLAB)],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_a_workflow_is_valid_for_its_system(schema: str, path: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_a_workflow_that_is_wrong_is_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "gate.yml"
    wrong.write_text((DOCS / "github" / "gate.yml").read_text().replace("runs-on:", "runs-at:"))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(wrong)]
    assert subprocess.run(command, capture_output=True).returncode == 1


@pytest.mark.parametrize("path", GITHUB, ids=lambda path: path.stem)
def test_a_fork_gets_no_machine_no_secret_and_no_right_to_write(path: Path) -> None:
    workflow = read(path)
    text = path.read_text()
    assert "pull_request_target" not in text
    assert "secrets." not in text
    # YAML 1.1 reads "on" as true.
    events = workflow["on"] if "on" in workflow else workflow[True]
    for name, job in workflow["jobs"].items():
        runs_here = "self-hosted" in str(job["runs-on"])
        if "pull_request" in events:
            assert runs_here
            assert "head.repo.full_name == github.repository" in job["if"], name
        if runs_here:
            assert workflow["permissions"] == {"contents": "read"}
            checkouts = [step for step in job["steps"] if "checkout" in step.get("uses", "")]
            assert all(step["with"]["persist-credentials"] is False for step in checkouts)
        for step in job["steps"]:
            # What a pull request can choose never becomes part of a script.
            assert "${{" not in step.get("run", "")
    if "workflow_run" in events:
        assert not [step for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]


# --- step by step ----------------------------------------------------------------------------------------------------


class Runner:
    """A machine that runs the ``run`` steps of a job with bash, as a runner does; actions are stood in for."""

    def __init__(self, folder: Path, cache: Path, python: Path) -> None:
        self.folder = folder
        self.artifacts = folder.parent / "artifacts"
        self.summary = folder.parent / "summary.md"
        self.calls = folder.parent / "calls.txt"
        tools = folder.parent / "tools"
        tools.mkdir()
        self._tool(
            tools / "gh",
            f'echo "gh $*" >> {self.calls}; [ "$1 $2" != "run download" ] || cp -r {self.artifacts} report',
        )
        self._tool(tools / "llmload", f'exec {sys.executable} -m pytest_llmload.cli "$@"')
        # Everything is installed: what a job would install is only noted.
        noted = f'if [ "$1 $2 $3" = "-m pip install" ]; then echo "$*" >> {self.calls}; exit 0; fi'
        self._tool(tools / "python", f'{noted}; exec {python} "$@"')
        self.environment = {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "GITHUB_ACTIONS": "true",
            "GITHUB_WORKSPACE": str(folder),
            "GITHUB_STEP_SUMMARY": str(self.summary),
        }
        self.own = {
            "MODEL": "prod=random:tiny-llama",
            "TESTS": "test_loads.py",
            "CACHE": str(cache),
            "OPTIONS": "--llm-device=cpu --llm-workload=1x8+3 -p no:cacheprovider -p no:randomly",
            "RUN_ID": "4711",
            "NUMBER": "12",
        }

    @staticmethod
    def _tool(path: Path, script: str) -> None:
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def step(self, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            cwd=self.folder,
            env={**self.environment, **self.own},
            capture_output=True,
            text=True,
            timeout=240,
        )

    def job(self, steps: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
        """Run a job: after a failed step only those with ``if: always()``."""
        done: list[tuple[str, int, str]] = []
        for step in steps:
            is_failed = any(status for _, status, _ in done)
            if is_failed and "always()" not in step.get("if", ""):
                continue
            if "upload-artifact" in step.get("uses", ""):
                shutil.rmtree(self.artifacts, ignore_errors=True)
                self.artifacts.mkdir()
                for pattern in step["with"]["path"].split():
                    for path in self.folder.glob(pattern):
                        shutil.copy(path, self.artifacts)
            if "run" in step:
                ended = self.step(step["run"])
                done.append((step["name"], ended.returncode, ended.stdout + ended.stderr))
        return done


@pytest.fixture
def runner(tmp_path: Path, checkpoint_cache: Path, forked_python: Path) -> Runner:
    """A checkout with tests of loads and without baselines, and where it is pushed to."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    made = Runner(folder, checkpoint_cache, forked_python)
    (folder / "test_loads.py").write_text(TESTS)
    (folder / "serving.py").write_text(SERVING.format(dtype="bfloat16"))
    (folder / "requirements.txt").write_text("")
    subprocess.run(["git", "init", "-q", "--bare", str(tmp_path / "origin")], check=True)
    identity = "git config user.name T && git config user.email t@localhost"
    setup = f"git init -q -b main && {identity} && git remote add origin ../origin"
    assert made.step(setup).returncode == 0
    options = made.own["OPTIONS"]
    recorded = made.step(
        f"python -m pytest $TESTS --llm-model=$MODEL {options} --llm-cache-dir=$CACHE --llm-update-baselines"
        " --llm-record-repeats=1 && git add . && git commit -qm 'Record' && git push -q origin main"
    )
    assert recorded.returncode == 0, recorded.stdout
    (folder / "serving.py").write_text(SERVING.format(dtype="float32"))
    assert made.step("git commit -qam 'Load in fp32'").returncode == 0
    made.summary.unlink(missing_ok=True)
    return made


def jobs(name: str) -> dict[str, Any]:
    found: dict[str, Any] = read(DOCS / "github" / name)["jobs"]
    return found


def test_githubs_steps_in_order(runner: Runner) -> None:
    """Red with the cause in the summary, commented, accepted as a pull request, and green."""
    gate = runner.job(jobs("gate.yml")["gate"]["steps"])
    assert [(name, status) for name, status, _ in gate] == [
        ("Install", 0),
        ("Look at the machine", 0),
        ("Load, measure and compare", 1),
    ], gate
    assert "bfloat16 -> float32" in runner.summary.read_text()
    assert "::error file=test_loads.py" in gate[-1][2]
    assert {path.name for path in runner.artifacts.iterdir()} == {"run.json", "run.md", "run.html", "junit.xml"}

    assert [status for _, status, _ in runner.job(jobs("comment.yml")["comment"]["steps"])] == [0, 0]
    assert "gh pr comment 12 --body-file report/run.md" in runner.calls.read_text()
    shutil.rmtree(runner.folder / "report")

    accepted = runner.job(jobs("accept.yml")["accept"]["steps"])
    assert not [step for step in accepted if step[1]], accepted
    assert "gh pr create --title Accept the baselines of run 4711" in runner.calls.read_text()
    body = (runner.folder / "body.md").read_text()
    assert re.search(r"accepted  host\.weights +.*MiB -> .*MiB  \(\+", body)
    branches = runner.step("git ls-remote --heads origin").stdout
    assert "refs/heads/baselines-4711" in branches

    runner.summary.unlink()
    again = runner.job(jobs("gate.yml")["gate"]["steps"])
    assert [status for _, status, _ in again] == [0, 0, 0], again
    assert "none failed" in runner.summary.read_text()


def test_the_matrix_is_joined(runner: Runner) -> None:
    workflow = jobs("matrix.yml")
    measured = runner.job(workflow["measure"]["steps"])
    assert measured[-1][1] == 1
    for gpu in ("a100", "h100"):
        target = runner.folder / "reports" / f"report-{gpu}" / "run.json"
        target.parent.mkdir(parents=True)
        report = json.loads((runner.artifacts / "run.json").read_text())
        report["runs"][0]["device"] = gpu
        target.write_text(json.dumps(report))
    runner.summary.unlink(missing_ok=True)
    merged = runner.job(workflow["merge"]["steps"])
    assert [(name, status) for name, status, _ in merged] == [("Install", 0), ("Join the reports", 1)], merged
    assert "2 of 2 loads failed" in runner.summary.read_text()
    assert {path.name for path in runner.artifacts.iterdir()} == {"all.json", "all.md", "all.html"}


def test_gitlabs_steps_in_order(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = read(GITLAB)
    del runner.environment["GITHUB_ACTIONS"]
    results = [runner.step(script) for script in pipeline["model loading"]["script"]]
    assert [done.returncode for done in results] == [0, 0, 1], results[-1].stdout
    issues = json.loads((runner.folder / "gl.codequality.json").read_text())
    assert issues[0]["location"] == {"path": "test_loads.py", "lines": {"begin": 5}}
    accepting = pipeline["accept baselines"]["script"]
    # The push goes to a server that is not here.
    done = [runner.step(script) for script in accepting if not script.startswith("git push")]
    assert [step.returncode for step in done] == [0] * len(done), done
    assert "baselines/prod" in runner.step("git show --stat --name-only HEAD").stdout
