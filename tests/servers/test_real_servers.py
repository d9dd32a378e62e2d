"""Each real server: recorded, gated, asked for another model, by many at once, until its context is full; killed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loads
import pytest
from certificates import certificate
from real_servers import KINDS, Real, Servers

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.job import Checkpoint, Job
from pytest_llmload.core.results import LOADED, NOT_APPLIED, LoadResult
from pytest_llmload.core.spec import LoadSpec, Workload
from pytest_llmload.process.serving.answers import Answer
from pytest_llmload.process.serving.finding import KEY
from pytest_llmload.process.serving.served_model import Served

Running = Callable[[str], Real]
#: What each says of itself.
NAMES = {
    "vllm": r"vllm 0\.32\.0",
    "llama-server": r"llama-server b\S+",
    "llama-cpp-python": r"llama-cpp-python 0\.3\.36",
    "litellm": r"litellm 1\.106\.12",
    "transformers-5": "transformers serve",
    "transformers-4": "transformers serve",
}
#: Those that serve one request after another only, or end one for another.
ONE_AT_A_TIME = ("llama-cpp-python",)
WITH_CACHE = ("vllm", "llama-server")
WORKLOAD = Workload(1, 32, 16)


@contextlib.contextmanager
def client(server: Real, servers: Servers, tmp_path: Path, **fields: Any) -> Iterator[Served]:
    """The client of a running server, in this process."""
    before = signal.getsignal(signal.SIGUSR1)
    folder = str(servers.checkpoint)
    model_id = fields.pop("model_id", server.model)
    spec = LoadSpec(model=folder, name="tiny-llama", strategy="served", **{"workload": WORKLOAD, **fields})
    job = Job(spec=spec, device=loads.CPU, checkpoint=Checkpoint(folder, "", ""))
    served = Served(
        dataclasses.replace(job, endpoint=f"{model_id}={server.url}/v1", timeout=240.0),
        lambda phase: None,
        tmp_path / "load.log",
    )
    try:
        yield served
    finally:
        served.close()
        signal.signal(signal.SIGUSR1, before)


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, running: Running, monkeypatch: pytest.MonkeyPatch) -> Real:
    real = running(request.param)
    monkeypatch.setenv(KEY, real.key)
    return real


def said(result: LoadResult) -> str:
    return "\n".join([*(problem.message for problem in result.problems), *result.notes])


def test_measured(server: Real, servers: Servers, tmp_path: Path) -> None:
    with client(server, servers, tmp_path) as served:
        result = served.load()
        assert (result.outcome, result.problems) == (LOADED, [])
        assert re.fullmatch(NAMES[server.name], result.environment["server"])
        metrics = result.metrics
        assert metrics["ttft"] > 0
        assert 0 < metrics["per_token"] < 5
        assert ("kv_cache.tokens" in metrics) == (server.name in WITH_CACHE)
        many = {"served.ttft.x8", "served.per_token.x8", "served.total.x8"}
        if server.name in ONE_AT_A_TIME:
            assert "--interrupt_requests False" in result.unavailable["served.total.x8"]
            assert not many & set(metrics)
        else:
            assert "served.total.x8" in metrics
            assert len(result.samples["served.total.x8"]) == 2
        assert ("does not count its tokens" in said(result)) == (server.name in ("llama-cpp-python", "transformers-4"))
        # What it generates is what the model generates; through a chat template it is another text.
        answer = served.ask({"kind": "generate", "text": "the of and", "max_new_tokens": 8})
        assert -1 not in answer["tokens"]
        assert answer["count"] == 8
        assert len(answer["tokens"]) in (0, 8)
        if server.name == "vllm":
            assert len(answer["tokens"]) == 8
        if server.name != "transformers-4":
            from pytest_llmload.worker.model.generation import generate

            _, loaded = loads.load("tiny-llama", measure=False)
            assert answer["text"][:8] == generate(loaded, "the of and", 8)["text"][:8]


def test_a_wrong_id_is_said(server: Real, servers: Servers, tmp_path: Path) -> None:
    with client(server, servers, tmp_path, model_id="acme/none") as served:
        result = served.load()
    assert result.outcome == NOT_APPLIED
    (problem,) = result.problems
    assert problem.check == "model"
    assert "'acme/none'" in problem.message
    assert "--llm-endpoint=ID=URL" in problem.hint


#: The statuses of requests without a key and with a wrong one.
REFUSALS = {"llama-server": (401, 401), "vllm": (401, 401), "litellm": (500, 400)}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_key_is_an_error(
    name: str, servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-server leaves /health and the list of models open; its first request is what is refused."""
    server = servers.start(name, **({} if name == "litellm" else {"key": "opensesame"}))
    without, wrong = REFUSALS[name]
    try:
        for key, sentence in (
            ("", f"answers {without}: it needs a key; set LLM_ENDPOINT_KEY"),
            ("wrong", f"answers {wrong}: it refused the key in LLM_ENDPOINT_KEY"),
        ):
            monkeypatch.setenv(KEY, key)
            with client(server, servers, tmp_path) as served, pytest.raises(MachineError, match=sentence):
                served.load()
        monkeypatch.setenv(KEY, server.key)
        with client(server, servers, tmp_path) as served:
            assert served.load().outcome == LOADED
    finally:
        server.stop()


def test_a_prefix(servers: Servers, tmp_path: Path) -> None:
    server = servers.start("llama-server", prefix="/llm")
    try:
        with client(server, servers, tmp_path) as served:
            assert served.load().outcome == LOADED
        without = dataclasses.replace(server, url=server.url.removesuffix("/llm"))
        with client(without, servers, tmp_path) as served:
            with pytest.raises(MachineError, match=r"there is no API under the address.*end the address with /llm"):
                served.load()
    finally:
        server.stop()


def test_tls(servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[0]))
    server = servers.start("litellm", tls=tls)
    monkeypatch.setenv(KEY, server.key)
    try:
        with client(server, servers, tmp_path) as served:
            assert served.load().outcome == LOADED
        monkeypatch.delenv("SSL_CERT_FILE")
        with client(server, servers, tmp_path) as served:
            with pytest.raises(MachineError, match="its certificate is not trusted: set SSL_CERT_FILE"):
                served.load()
        plain = dataclasses.replace(server, url=server.url.replace("https:", "http:"))
        with client(plain, servers, tmp_path) as served:
            with pytest.raises(MachineError, match="the endpoint speaks TLS: write https:// in place of http://"):
                served.load()
    finally:
        server.stop()


@pytest.mark.parametrize("name", ["llama-server", "litellm"])
def test_a_full_context_stops_early_and_is_said(
    name: str, servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = servers.start(name, context=64, slots=1)
    monkeypatch.setenv(KEY, server.key)
    try:
        with client(server, servers, tmp_path, workload=Workload(1, 200, 128)) as served:
            result = served.load()
    finally:
        server.stop()
    assert "ttft" not in result.metrics
    assert "context" in said(result) or "context" in " ".join(result.unavailable.values())


@pytest.mark.parametrize("name", KINDS)
def test_killed_in_the_middle_of_an_answer(
    name: str, servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = servers.start(name)
    monkeypatch.setenv(KEY, server.key)
    add = Answer.add

    def kill_at_the_third(answer: Answer, moment: float, piece: str) -> None:
        add(answer, moment, piece)
        if len(answer.pieces) == 3:
            os.kill(server.pid, signal.SIGKILL)

    monkeypatch.setattr(Answer, "add", kill_at_the_third)
    try:
        with client(server, servers, tmp_path, workload=Workload(1, 32, 2000)) as served:
            result = served.load()
    finally:
        server.stop()
    assert result.outcome == NOT_APPLIED
    problem = result.problems[0]
    assert problem.check in ("stream", "answers")
    assert "pieces of text came" in problem.message or "streamed an error" in problem.message


@pytest.mark.parametrize("name", KINDS)
def test_recorded_and_green_five_times(
    name: str, running: Running, servers: Servers, pytester: pytest.Pytester, project: Any, monkeypatch: Any
) -> None:
    server = running(name)
    monkeypatch.setenv(KEY, server.key)
    pytester.makepyfile(
        """
        import pytest
        from pytest_llmload.suite import test_generates
        @pytest.mark.parametrize("turn", range(5))
        def test_memory(turn, llm_load, memory_baseline):
            llm = llm_load(strategy="served")
            memory_baseline.check(llm, metrics=None)
            assert llm.generate("the of and", max_new_tokens=4).text
        """
    )
    options = (
        f"--llm-model=tiny-llama={servers.checkpoint}",
        f"--llm-endpoint={server.model}={server.url}/v1",
        "--llm-workload=1x16+8",
        "--llm-record-repeats=1",
        "--llm-strategy=served",
    )
    project(*options, "--llm-update-baselines", "-k", "0", fast=False).assert_outcomes(passed=1, deselected=5)
    project(*options, fast=False).assert_outcomes(passed=6)
    files = list((pytester.path / "baselines").rglob("*.json"))
    if name in WITH_CACHE:
        (file,) = files
        baseline = json.loads(file.read_text())
        assert set(baseline["memory"]) == {"kv_cache.tokens"}
        assert "127.0.0.1" not in file.read_text()


@pytest.mark.parametrize("name", ["llama-server", "transformers-4"])
def test_a_started_server_has_its_own_versions(
    name: str, servers: Servers, pytester: pytest.Pytester, project: Any
) -> None:
    command = servers.command(name, "{port}")
    pytester.makepyfile(
        f"""
        import pytest
        @pytest.mark.strategy("served", command={command!r}, model_id={servers.alias(name)!r})
        def test_memory(llm, memory_baseline):
            memory_baseline.check(llm)
        """.replace("model_id='tiny-llama'", f"model_id={str(servers.checkpoint)!r}")
    )
    result = project("--llm-update-baselines", "--llm-record-repeats=1", "--llm-report=run.json", "--llm-timeout=280s")
    result.assert_outcomes(passed=1)
    (file,) = (pytester.path / "baselines").rglob("*.json")
    environment = json.loads(file.read_text())["environment"]
    assert re.fullmatch(NAMES[name], environment["server"])
    assert ("torch" in environment) == (name == "transformers-4")
    assert environment.get("transformers", "4.57.6") == "4.57.6"
    (run,) = json.loads((pytester.path / "run.json").read_text())["runs"]
    assert {"start", "first_answer"} <= set(run["phases"])
    assert run["metrics"]["server.peak"] >= run["metrics"]["server.settled"] > 0
