"""Real servers that are started: by a load, from start to first answer and to their end; as the documentation does."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from real_servers import ENVIRONMENT, MASTER_KEY, Servers, Shared, at_the_third_piece, client, owner

from pytest_llmload.core.results import CRASHED, LOADED
from pytest_llmload.core.spec import Workload
from pytest_llmload.process.serving.finding import KEY
from pytest_llmload.process.serving.server_process import HOST, free_port
from pytest_llmload.system import proc
from pytest_llmload.system.process_exit import Died
from pytest_llmload.system.process_tree import tree

PAGE = (Path(__file__).parents[2] / "docs" / "strategies" / "served.md").read_text(encoding="utf-8")
#: The parts of a start that each server's log tells; on a GPU, vLLM's has ``start.model`` besides.
PHASES: dict[str, set[str]] = {
    "vllm": {"start.weights", "start.engine"},
    "llama-server": {"start.model"},
    "llama-cpp-python": set(),
    "transformers-4": set(),
}
#: The environments that are not called as the server is.
ENVIRONMENTS = {"llama-cpp-python": "llama-cpp"}


@pytest.mark.parametrize("name", PHASES)
def test_the_start_of_a_server(name: str, servers: Servers, pytester: pytest.Pytester, project: Any) -> None:
    command = servers.command(name, "{port}")
    pytester.makepyfile(
        f"""
        import pytest
        @pytest.mark.strategy("served", command={command!r}, model_id={servers.id(name)!r})
        def test_memory(llm, memory_baseline):
            memory_baseline.check(llm)
        """
    )
    options = ("--llm-record-repeats=1", "--llm-timeout=280s")
    project(*options, "--llm-update-baselines", "--llm-report=run.json").assert_outcomes(passed=1)
    (file,) = (pytester.path / "baselines").rglob("*.json")
    baseline = json.loads(file.read_text())
    environment = baseline["environment"]
    assert environment["server"].startswith("transformers serve" if name == "transformers-4" else f"{name} ")
    # The versions of the server's libraries, and none of those of the process that asks it.
    libraries = {"torch", "transformers", "accelerate", "bitsandbytes"}
    assert {entry: environment[entry].partition("+")[0] for entry in libraries & set(environment)} == {
        entry: version for entry, version in pinned(name) if entry in libraries
    }
    assert {"server.peak", "server.settled"} <= set(baseline["memory"])
    (run,) = json.loads((pytester.path / "run.json").read_text())["runs"]
    phases = run["phases"]
    assert {phase for phase in phases if phase.startswith("start.")} == PHASES[name]
    assert all(0 < phases[phase] < phases["start"] for phase in PHASES[name])
    assert phases["start"] + phases["first_answer"] == pytest.approx(run["metrics"]["load"], abs=0.5)
    assert run["metrics"]["server.peak"] >= run["metrics"]["server.settled"] > 0


def pinned(name: str) -> list[list[str]]:
    """Return the packages of a server's environment, with their versions."""
    file = Path(__file__).parent / "requirements" / f"{ENVIRONMENTS.get(name, name)}.txt"
    return [line.split("==") for line in file.read_text().split()]


def test_the_memory_of_a_server_is_that_of_its_tree_and_its_engines_end_is_said(
    servers: Servers, tmp_path: Path
) -> None:
    """vLLM's weights and cache are in a process that its API server starts."""
    with owner("vllm", servers, tmp_path, workload=Workload(1, 32, 2000)) as served:
        engine: list[int] = []

        def kill_the_largest() -> None:
            assert served._server is not None
            pids = tree(served._server.pid)
            assert len(pids) > 2
            engine.append(max(pids, key=proc.shared_out))
            assert engine[0] != served._server.pid
            os.kill(engine[0], signal.SIGKILL)

        with pytest.MonkeyPatch.context() as patch:
            at_the_third_piece(patch, kill_the_largest)
            with pytest.raises(Died, match=r"the server exited with .* streamed an error: .*EngineCore") as caught:
                served.load()
        result = served._result
    assert caught.value.outcome == CRASHED
    assert re.search("EngineCore|EngineDead", caught.value.info.log)
    # Its cache alone is 1 GiB, of which it has touched little.
    assert result.metrics["server.settled"] > 500 << 20
    assert PHASES["vllm"] <= set(result.phases)


def test_a_started_server_that_is_killed_is_a_crash(servers: Servers, tmp_path: Path) -> None:
    with owner("llama-server", servers, tmp_path, workload=Workload(1, 32, 2000)) as served:
        with pytest.MonkeyPatch.context() as patch:
            at_the_third_piece(patch, lambda: os.kill(served._server.pid, signal.SIGKILL))  # type: ignore[union-attr]
            with pytest.raises(Died, match="the server was killed by SIGKILL in the middle of an answer") as caught:
                served.load()
    assert (caught.value.outcome, caught.value.signal) == (CRASHED, signal.SIGKILL)


# --- as the documentation starts them --------------------------------------------------------------------------------


def documented() -> dict[str, tuple[str, str]]:
    """Return the commands of the table: "server, place" -> the server, the command."""
    table = PAGE.partition("| server | in a container |")[2].partition("\n\n")[0]
    found = {}
    for row in table.splitlines()[2:]:
        server, *places = [cell.strip().strip("`") for cell in row.strip("|").split("|")]
        for place, cell in zip(("container", "service"), places, strict=True):
            found[f"{server}, {place}"] = (server, cell.partition("`")[0])
    return found


#: The servers of the table that there is an environment for -> its name. There is no program ``llama-server`` on PyPI,
#: and text-generation-inference is not there at all.
TABLE = {
    "vLLM": "vllm",
    "llama-cpp-python": "llama-cpp",
    "LiteLLM": "litellm",
    "transformers serve (5)": "transformers-5",
    "transformers serve (4)": "transformers-4",
}
#: What the images of the table run, from the program's documentation.
ENTRY_POINTS = {
    "vllm/vllm-openai": "python -m vllm.entrypoints.openai.api_server",
    "ghcr.io/abetlen/llama-cpp-python": "python -m uvicorn --factory llama_cpp.server.app:create_app",
    "ghcr.io/berriai/litellm:main-stable": "litellm",
    "python:3.12": "",
}
RUN = {key: value for key, value in documented().items() if value[0] in TABLE}


def in_the_container(command: str) -> tuple[list[str], list[str]]:
    """Return the environment and the words of what a container runs."""
    words = iter(shlex.split(command.removeprefix("docker run ")))
    environment: list[str] = []
    for word in words:
        if word in ENTRY_POINTS:
            rest = list(words)
            # A shell first installs it.
            return environment, shlex.split(rest[-1].partition("exec ")[2]) if "sh" in rest else [
                *ENTRY_POINTS[word].split(),
                *rest,
            ]
        value = next(words)
        environment += [value] if word == "-e" else []
    raise AssertionError(f"no image that is known: {command}")


@pytest.mark.parametrize("start", RUN)
def test_a_start_of_the_documentation_works(
    start: str, running: Shared, servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, command = RUN[start]
    environment, words = in_the_container(command) if start.endswith("container") else ([], shlex.split(command))
    programs = Path(servers.python(TABLE[name])).parent
    port = str(free_port())
    with_name = "served-model-name" in command or "alias" in command.lower()
    model, key = ("prod" if with_name else str(servers.checkpoint)), ""
    places = {"org/model": str(servers.checkpoint), "/models/model.gguf": str(servers.gguf()), "0.0.0.0": HOST}
    if name == "LiteLLM":
        behind = running("llama-server")
        places |= dict.fromkeys(("/etc/litellm.yaml", "/app/config.yaml"), str(servers.proxy_config(behind, "prod")))
        model, key = "prod", MASTER_KEY
    words = [places.get(word, word) for word in words]
    environment = [
        f"{name}={places.get(value, value)}" for name, _, value in (one.partition("=") for one in environment)
    ]
    words[0] = str(programs / Path(words[0]).name)
    words += ["--enforce-eager"] if name == "vLLM" else []
    own = servers.started(
        f"as documented {TABLE[name]}",
        ["env", *ENVIRONMENT, *environment, *words, "--port", port],
        f"http://{HOST}:{port}",
        model,
        key,
    )
    monkeypatch.setenv(KEY, key)
    try:
        with client(own, servers, tmp_path, workload=Workload(1, 8, 4)) as served:
            result = served.load()
    finally:
        own.stop()
    assert (result.outcome, result.problems) == (LOADED, [])
    # A short answer of a small model may come in one read, and that is said.
    assert result.metrics.get("ttft", 0) > 0 or "pieces of text came in" in result.unavailable["ttft"]
