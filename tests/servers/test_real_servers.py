"""Each real server: recorded, gated, asked for another model, by many at once, until its context is full; killed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import loads
import pytest
from certificates import certificate
from real_servers import KINDS, Real, Servers, Shared, at_the_third_piece, client, said

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.results import LOADED, NOT_APPLIED
from pytest_llmload.core.spec import Workload
from pytest_llmload.process.serving.finding import KEY
from pytest_llmload.process.serving.http import Endpoint, Reply
from pytest_llmload.system.process_tree import tree

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
#: A context that is full before an answer has all of its tokens.
FULL = Workload(1, 200, 128)


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, running: Shared, monkeypatch: pytest.MonkeyPatch) -> Real:
    real = running(request.param)
    monkeypatch.setenv(KEY, real.key)
    return real


def capacity(server: Real, started_with: int) -> int | None:
    """Return what a server's cache holds, by what it was started with or what its log says."""
    if server.name == "llama-server":
        return started_with
    found = re.search(r"KV cache size: ([\d,]+) tokens", server.process.output)
    return int(found[1].replace(",", "")) if found is not None else None


def test_each_server_is_measured_by_its_own_account(server: Real, servers: Servers, tmp_path: Path) -> None:
    with client(server, servers, tmp_path) as served:
        result = served.load()
        assert (result.outcome, result.problems) == (LOADED, [])
        assert re.fullmatch(NAMES[server.name], result.environment["server"])
        metrics = result.metrics
        assert metrics["ttft"] > 0
        assert 0 < metrics["per_token"] < 5
        assert metrics.get("kv_cache.tokens") == capacity(server, 4096 * 8)
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


def test_reasoning_is_text_and_the_address_chooses_chat(running: Shared, servers: Servers, tmp_path: Path) -> None:
    server = running("vllm")
    question = [{"role": "user", "content": "the of and"}]
    ask = {"model": server.model, "messages": question, "max_tokens": 8, "stream": True, "ignore_eos": True}
    events = [str(event) for event in Endpoint(server.url).events("/v1/chat/completions", ask)]
    assert any(re.search(r'"reasoning": ?"[^"]', event) for event in events)
    assert not any(re.search(r'"content": ?"[^"]', event) for event in events)
    with client(server, servers, tmp_path, path="/v1/chat/completions") as served:
        result = served.load()
    assert (result.outcome, result.problems) == (LOADED, [])
    assert {"ttft", "per_token", "served.total.x8"} <= set(result.metrics)
    assert len(result.samples["ttft"]) == 5 or "pieces of text came in" in said(result)
    # It was asked for; a chat that is only what is left would be noted.
    assert "chat template" not in said(result)


#: The statuses of requests without a key and with a wrong one.
REFUSALS = {"llama-server": (401, 401), "llama-cpp-python": (401, 401), "vllm": (401, 401), "litellm": (500, 400)}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_key_is_an_error(
    name: str, smaller: Shared, servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-server leaves /health and the list of models open; its first request is what is refused."""
    server = smaller(name)
    without, wrong = REFUSALS[name]
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


def test_a_path_before_the_api_is_part_of_the_address(servers: Servers, tmp_path: Path) -> None:
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


def test_tls_with_an_authority_of_ones_own(servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


#: Where an answer that does not fit into the context ends, and what is said of it.
EARLY = {
    "llama-server": "5 answers stopped after 56 of 128 tokens: a slot's context is full: .* --ctx-size divided by",
    "litellm": "5 answers stopped after 56 of 128 tokens: .* or its context is full",
    "llama-cpp-python": "5 answers stopped after 56 of 128 tokens: its context is full: .* must fit into --n_ctx",
}


@pytest.mark.parametrize("name", EARLY)
def test_a_full_context_stops_early_and_is_said(
    name: str, smaller: Shared, servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = smaller(name)
    monkeypatch.setenv(KEY, server.key)
    with client(server, servers, tmp_path, workload=FULL) as served:
        result = served.load()
    assert not {"ttft", "per_token", "served.total.x8"} & set(result.metrics)
    assert re.search(EARLY[name], said(result))
    assert re.search(EARLY[name], result.unavailable["per_token"])


def test_vllm_refuses_what_does_not_fit_into_its_context_and_the_setting_is_named(
    running: Shared, servers: Servers, tmp_path: Path
) -> None:
    """It lowers the request's limit, and then says that min_tokens is above it."""
    server = running("vllm")
    with client(server, servers, tmp_path, workload=Workload(1, 32, 5000)) as served:
        result = served.load()
    assert result.outcome == NOT_APPLIED
    (problem,) = result.problems
    assert problem.check == "answers"
    assert "POST /v1/completions answered 400: " in problem.message
    assert problem.hint == "it has answered shorter requests: prompt and new tokens must fit into --max-model-len"


@pytest.mark.parametrize("name", ["transformers-5", "transformers-4"])
def test_an_answer_goes_on_past_the_end_of_the_sequence(name: str, servers: Servers, tmp_path: Path) -> None:
    """Half of all tokens end a sequence; transformers' servers have no limit that stops them before the request's."""
    checkpoint = tmp_path / servers.checkpoint.name
    shutil.copytree(servers.checkpoint, checkpoint)
    size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    settings = {**json.loads((checkpoint / "generation_config.json").read_text()), "eos_token_id": [*range(0, size, 2)]}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    own = dataclasses.replace(servers, folder=tmp_path, checkpoint=checkpoint)
    server = own.start(name)
    try:
        with client(server, own, tmp_path) as served:
            result = served.load()
        question = [{"role": "user", "content": "the of and"}]
        ask = {"model": server.model, "messages": question, "max_tokens": 64, "stream": True}
        events = [str(event) for event in Endpoint(server.url).events("/v1/chat/completions", ask)]
    finally:
        server.stop()
    assert (result.outcome, result.problems) == (LOADED, [])
    assert not any("stopped after" in note for note in result.notes)
    # Only eight whole answers make a total.
    assert result.metrics["served.total.x8"] > 0
    # The plant: who does not ask for more gets less.
    assert any('"finish_reason":"stop"' in event.replace(" ", "") for event in events)


def test_a_server_that_serves_one_after_another_is_measured_by_eight_at_once(servers: Servers, tmp_path: Path) -> None:
    server = servers.start("llama-cpp-python", arguments=["--interrupt_requests", "False"])
    try:
        with client(server, servers, tmp_path) as served:
            result = served.load()
    finally:
        server.stop()
    assert (result.outcome, result.problems) == (LOADED, [])
    assert len(result.samples["served.total.x8"]) == 2
    assert result.metrics["served.ttft.x8"] > result.metrics["ttft"]


def test_a_proxy_without_its_server_is_said_at_once(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LiteLLM's /health asks every server behind it, and hangs: it is not asked, and nothing waits for a time-out."""
    server = servers.start("litellm")
    monkeypatch.setenv(KEY, server.key)
    server.behind[0].stop()
    got: list[str] = []
    get = Endpoint.get

    def getting(self: Endpoint, path: str, *more: Any) -> Reply:
        got.append(path)
        return get(self, path, *more)

    monkeypatch.setattr(Endpoint, "get", getting)
    try:
        with client(server, servers, tmp_path) as served:
            result = served.load()
    finally:
        server.process.stop()
    assert "/health/readiness" in got
    assert "/health" not in got
    assert result.outcome == NOT_APPLIED
    assert "POST /v1/completions answered 5" in result.problems[0].message
    assert "Connection error" in result.problems[0].message


@pytest.mark.parametrize("name", WITH_CACHE)
def test_a_lower_capacity_under_the_same_limit_is_red(
    name: str,
    running: Shared,
    smaller: Shared,
    servers: Servers,
    pytester: pytest.Pytester,
    project: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytester.makepyfile("def test_memory(llm, memory_baseline): memory_baseline.check(llm)")
    options = (f"--llm-model=tiny-llama={servers.checkpoint}", "--llm-workload=1x16+4", "--llm-record-repeats=1")
    whole, less = running(name), smaller(name)
    address = f"--llm-endpoint={whole.model}={whole.url}"
    project(*options, address, "--llm-update-baselines", fast=False).assert_outcomes(passed=1)
    monkeypatch.setenv(KEY, less.key)
    result = project(*options, f"--llm-endpoint={less.model}={less.url}", fast=False)
    result.assert_outcomes(failed=1)
    before, now = capacity(whole, 4096 * 8), capacity(less, 256)
    assert before is not None
    if name == "vllm":
        assert now == pytest.approx(before / 2, rel=0.01)
    result.stdout.fnmatch_lines([f"*kv_cache.tokens  {before:,} -> {now:,}*"])


@pytest.mark.parametrize("name", KINDS)
def test_killed_in_the_middle_of_an_answer(
    name: str, smaller: Shared, servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Half a minute is saved; the context of the others would be full too soon.
    server = smaller.take(name) if name == "vllm" else servers.start(name)
    monkeypatch.setenv(KEY, server.key)
    # vLLM has further processes, of which one waits for ever for the killed one.
    pids = tree(server.pid)
    at_the_third_piece(monkeypatch, lambda: os.kill(server.pid, signal.SIGKILL))
    try:
        with client(server, servers, tmp_path, workload=Workload(1, 32, 2000)) as served:
            result = served.load()
    finally:
        server.stop()
        for pid in pids[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert result.outcome == NOT_APPLIED
    problem = result.problems[0]
    assert problem.check in ("stream", "answers")
    assert "pieces of text came" in problem.message or "streamed an error" in problem.message


@pytest.mark.parametrize("name", KINDS)
def test_recorded_and_green_five_times(
    name: str, running: Shared, servers: Servers, pytester: pytest.Pytester, project: Any, monkeypatch: Any
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


def test_recording_and_gating_take_one_client_and_few_requests(
    running: Shared, servers: Servers, pytester: pytest.Pytester, project: Any
) -> None:
    """As the documentation has it, with the default settings; by what the server itself counts."""
    server = running("vllm")

    def served() -> float:
        text = Endpoint(server.url).get("/metrics").body
        return sum(map(float, re.findall(r"^vllm:request_success_total\{.*\} (\S+)$", text, re.MULTILINE)))

    suite = ("--pyargs", "pytest_llmload.suite", f"--llm-model=tiny-llama={servers.checkpoint}")
    for mode in ("--llm-update-baselines", "--llm-strict"):
        before = served()
        project(*suite, f"--llm-endpoint={server.url}", mode, fast=False).assert_outcomes(passed=2)
        # Two that check, five rounds of one, two of eight, and what the suite generates.
        assert 3 < served() - before <= 2 + 5 + 2 * 8 + 1
