"""Endpoints: real servers of small models, and servers with something wrong, each caught by its own check."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpcore
import loads
import pytest
from certificates import certificate
from fake_server import MODEL, serving
from served_models import client

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.job import Checkpoint, Job
from pytest_llmload.core.metrics import METRICS
from pytest_llmload.core.results import CRASHED, LOADED, NOT_APPLIED, TIMEOUT, LoadResult
from pytest_llmload.core.spec import LoadSpec, Workload
from pytest_llmload.process.serving import finding, launch, served_model, server_process, wire
from pytest_llmload.process.serving.answers import Answer
from pytest_llmload.process.serving.counting import per_token
from pytest_llmload.process.serving.finding import KEY
from pytest_llmload.process.serving.http import Endpoint, Event, Reply
from pytest_llmload.process.serving.prompts import Prompts
from pytest_llmload.process.serving.request_rounds import Round, RoundTimes
from pytest_llmload.process.serving.served_model import ServedModel
from pytest_llmload.process.serving.servers.base import SelfDescription
from pytest_llmload.process.serving.servers.llama_server import LlamaServer
from pytest_llmload.process.serving.servers.vllm import Vllm
from pytest_llmload.system.process_exit import Died
from pytest_llmload.system.process_tree import tree

FAKE = Path(__file__).with_name("fake_server.py")
SMALL = Workload(1, 16, 4)


def foreign(url: str, timeout: float = 90.0, model: str = MODEL, **fields: Any) -> Any:
    spec = LoadSpec(model=model, name="prod", strategy="served", **{"workload": SMALL, **fields})
    return dataclasses.replace(
        Job(spec=spec, device=loads.CPU, checkpoint=Checkpoint("", "", "")), endpoint=url, timeout=timeout
    )


def asked(mode: str, tmp_path: Path, **fields: Any) -> LoadResult:
    """The load of a running endpoint."""
    with serving(mode) as (url, _), client(foreign(url, **fields), tmp_path) as served:
        return served.load()


def started(mode: str, tmp_path: Path, timeout: float = 90.0, megabytes: int = 0) -> LoadResult:
    """The load of a server that is started by a command."""
    command = [sys.executable, str(FAKE), "{port}", mode, "{model}", str(megabytes)]
    options = (("command", json.dumps(command)),)
    job = loads.job("tiny-llama", strategy="served", options=options, workload=SMALL)
    with client(dataclasses.replace(job, timeout=timeout), tmp_path) as served:
        return served.load()


def split(text: str, *, add_special_tokens: bool = True) -> dict[str, list[str]]:
    """A tokenizer of words, which puts a BOS first."""
    return {"input_ids": [*(["<bos>"] if add_special_tokens else []), *text.split()]}


def problems(result: LoadResult) -> list[tuple[str, str]]:
    return [(problem.check, problem.message) for problem in result.problems]


# --- transformers' own server ----------------------------------------------------------------------------------------


def real(tmp_path: Path, **fields: Any) -> Any:
    return dataclasses.replace(loads.job("tiny-llama", strategy="served", **fields), timeout=600.0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServedModel, LoadResult]]:
    """A server of the dense model in fp32, which takes seconds to start, and its load; it ends with its client."""
    folder = tmp_path_factory.mktemp("dense")
    with client(real(folder, dtype="fp32"), folder) as served:
        yield served, served.load()
        assert served._server is not None
        pids = tree(served._server.pid)
    assert pids
    assert not [pid for pid in pids if Path(f"/proc/{pid}/exe").exists()]


def lend(served: ServedModel, patch: pytest.MonkeyPatch) -> None:
    """Have the next load get this server, which it neither starts nor ends, as the one that it has started."""
    server = copy.copy(served._server)
    assert server is not None
    patch.setattr(server, "stop", lambda: None)
    patch.setattr(served_model, "ServerProcess", lambda command, log: server)
    patch.setattr(served_model, "free_port", lambda: int(served._endpoint.url.rpartition(":")[2]))


def test_a_real_server_is_measured(dense: tuple[ServedModel, LoadResult]) -> None:
    served, result = dense
    assert (result.outcome, problems(result)) == (LOADED, [])
    metrics = result.metrics
    assert metrics["load"] > result.phases["start"] > 0.5
    assert 0 < metrics["per_token"] < metrics["load"]
    assert 0 < metrics["ttft"] < metrics["served.total.x8"]
    assert {"served.ttft.x8", "served.per_token.x8"} <= set(metrics)
    assert 100 << 20 < metrics["server.settled"] <= metrics["server.peak"] < 4 << 30
    assert len(result.samples["ttft"]) == 5
    # On a machine whose cores are busy, an answer may come in lumps; its times are left out, and a note says so.
    lumps = [note for note in result.notes if "pieces of text came in" in note]
    assert len(result.samples["served.ttft.x8"]) == 16 or lumps
    # Of all metrics it is said what they are or why they are not.
    assert set(METRICS) <= set(metrics) | set(result.unavailable)
    assert "cannot be inspected" in result.unavailable["host.weights"]
    assert result.environment["server"] == "transformers serve"
    assert result.notes == lumps
    # What it generates is what the model generates.
    said = served.ask({"kind": "generate", "text": "Hello", "max_new_tokens": 8})
    _, loaded = loads.load("tiny-llama", dtype="fp32", measure=False)
    from pytest_llmload.worker.model.generation import generate

    assert said["text"] == generate(loaded, "Hello", 8)["text"]
    assert len(said["tokens"]) == 8
    refused = served.ask({"kind": "run"})
    assert "use llm.generate()" in refused["error"]["message"]


def test_a_quantised_server(tmp_path: Path) -> None:
    with client(real(tmp_path, quant="nf4"), tmp_path) as served:
        result = served.load()
    assert (result.outcome, problems(result)) == (LOADED, [])
    assert any("too small for its memory" in note for note in result.notes)
    assert any("double quantisation" in note for note in result.notes)


def test_a_server_that_quantised_nothing(
    dense: tuple[ServedModel, LoadResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lend(dense[0], monkeypatch)
    with client(real(tmp_path, dtype="fp32", quant="nf4"), tmp_path) as served:
        result = served.load()
    assert result.outcome == NOT_APPLIED
    assert problems(result) == [
        (
            "quantised",
            "nf4 was requested, but no process of the server has loaded bitsandbytes: nothing was quantised",
        ),
        ("quantised", "the server answers as the dense model does, not as the one in nf4"),
    ]


def test_a_server_of_other_weights_under_the_right_name(
    dense: tuple[ServedModel, LoadResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same shape, same tokenizer, same id: only what it says tells."""
    from safetensors.torch import load_file, save_file

    served_path = loads.checkpoint("tiny-llama").path
    requested = tmp_path / "requested"
    shutil.copytree(served_path, requested)
    (file,) = requested.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name] = -tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    right = real(tmp_path, dtype="fp32")
    wrong = dataclasses.replace(right, checkpoint=dataclasses.replace(right.checkpoint, path=str(requested)))
    lend(dense[0], monkeypatch)
    monkeypatch.setattr("pytest_llmload.process.serving.endpoint_checks.choose", lambda job, about: (served_path, []))
    with client(wrong, tmp_path) as served:
        result = served.load()
    assert result.outcome == NOT_APPLIED
    ((check, text),) = problems(result)
    assert check == "output"
    assert text.startswith("the server answers ")
    assert text.endswith(", in fp32")


# --- running endpoints -----------------------------------------------------------------------------------------------


def test_vllm(tmp_path: Path) -> None:
    with serving("openai+vllm") as (url, seen), client(foreign(f"{url}/v1"), tmp_path) as served:
        result = served.load()
        assert (result.outcome, problems(result)) == (LOADED, [])
        assert result.metrics["kv_cache.tokens"] == 661 * 16
        assert result.environment == {"host": "endpoint", "server": "vllm 0.11.0"}
        assert {"load", "server.peak", "gpu.settled"} <= set(result.unavailable)
        assert served.ask({"kind": "generate", "text": "a", "max_new_tokens": 3})["tokens"] == []
        chat = [{"role": "user", "content": "Hi"}]
        refused = served.ask({"kind": "generate", "text": chat, "max_new_tokens": 3})
        assert "no tokenizer for the chat's messages (its files are not on this machine)" in refused["error"]["message"]
    prompts = [request["prompt"] for request in seen if request.get("stream")]
    # No prefix cache can answer in the model's place.
    assert len({prompt.split()[0:4].__str__() for prompt in prompts[:-1]}) == len(prompts) - 1
    assert all(request["ignore_eos"] and request["temperature"] == 0 for request in seen)
    assert all(len(prompt.split()) == 16 for prompt in prompts[:-1])


def test_text_generation_inference(tmp_path: Path) -> None:
    with serving("tgi") as (url, seen), client(foreign(url), tmp_path) as served:
        result = served.load()
        assert (result.outcome, problems(result)) == (LOADED, [])
        assert result.metrics["kv_cache.tokens"] == 1000
        assert result.environment["server"] == "text-generation-inference 3.3.7"
        assert result.environment["revision"] == "abc123"
        assert served.ask({"kind": "generate", "text": "a", "max_new_tokens": 3})["tokens"] == [0, 1, 2]
    assert {request["path"] for request in seen} == {"/generate_stream"}
    assert "per_token" in result.metrics


def test_chat_only_and_without_ignore_eos(tmp_path: Path) -> None:
    result = asked("chat+strict", tmp_path)
    assert (result.outcome, problems(result)) == (LOADED, [])
    assert any("chat template" in note for note in result.notes)
    assert any("no option to continue" in note for note in result.notes)


def test_a_piece_of_text_is_not_a_token(tmp_path: Path) -> None:
    uncounted = asked("openai+uncounted", tmp_path)
    assert uncounted.outcome == LOADED
    assert "per_token" not in uncounted.metrics
    assert "does not count its tokens" in uncounted.unavailable["per_token"]
    # Three of eight tokens come in one piece: where a tokenizer can tell, five come after it.
    answer = Answer(0.0, stamps=[1.0, 1.5, 2.0], pieces=["w0 w1 w2", "w3", "w4 w5 w6 w7"], tokens=8)
    for tokenizer, further in ((split, 5), (None, 7)):
        assert per_token(Prompts(16, tokenizer, salted=False), answer, 8) == pytest.approx(1.0 / further)
    assert per_token(Prompts(16, None, salted=False), Answer(0.0, [1.0], ["all"]), 8) is None


def test_answers_that_stop_early_are_in_no_figure(tmp_path: Path) -> None:
    result = asked("openai+short", tmp_path)
    assert result.outcome == LOADED
    assert {"ttft", "per_token", "served.total.x8"} <= set(result.unavailable)
    assert "stopped after 2 of 4 tokens: it ignores ignore_eos" in result.unavailable["per_token"]
    assert any("5 answers stopped after 2 of 4 tokens" in note for note in result.notes)


def test_a_limit_that_a_server_lowers_without_a_word_is_no_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full context ends an answer with ``length`` too; only half of it may be there."""
    monkeypatch.setattr(served_model, "load_tokenizer", lambda job: (split, ""))
    result = asked("openai+uncounted+llama_cpp+short", tmp_path)
    assert not {"ttft", "per_token", "served.total.x8"} & set(result.metrics)
    assert "stopped after 2 of 4 tokens: its context is full" in result.unavailable["per_token"]
    result = asked("openai+uncounted+llama_cpp", tmp_path)
    assert {"ttft", "per_token", "served.total.x8"} <= set(result.metrics)
    assert any("counted by the usage of answers that are not streams" in note for note in result.notes)


def test_a_refusal_of_a_longer_request_names_the_context(tmp_path: Path) -> None:
    (problem,) = asked("openai+vllm+full", tmp_path).problems
    assert "answered 400: " in problem.message
    assert problem.hint == "it has answered shorter requests: prompt and new tokens must fit into --max-model-len"


def test_an_id_that_proves_nothing_is_a_note(tmp_path: Path) -> None:
    assert any("any model id" in note for note in asked("openai+any", tmp_path).notes)


def test_answers_that_another_request_cut_off_are_said_and_single_ones_are_measured(tmp_path: Path) -> None:
    result = asked("openai+cuts", tmp_path)
    assert (result.outcome, problems(result)) == (LOADED, [])
    assert {"ttft", "per_token"} <= set(result.metrics)
    assert "--interrupt_requests False" in result.unavailable["served.total.x8"]
    assert "served.ttft.x8" not in result.metrics
    # Alone it must not happen.
    with serving("openai+cuts", running=[1]) as (url, _), client(foreign(url), tmp_path) as served:
        result = served.load()
    assert result.outcome == NOT_APPLIED
    assert "ended with [DONE] and no finish_reason" in problems(result)[0][1]


def test_each_kind_of_delta_is_text(tmp_path: Path) -> None:
    result = asked("chat+reasons", tmp_path)
    assert {"ttft", "per_token"} <= set(result.metrics)


def test_a_key_that_only_requests_need_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers leave /health and the list of models open."""
    with pytest.raises(MachineError, match="answers 401: it needs a key; set LLM_ENDPOINT_KEY"):
        asked("openai+guarded", tmp_path)
    monkeypatch.setenv(KEY, "wrong")
    with pytest.raises(MachineError, match="it refused the key in LLM_ENDPOINT_KEY"):
        asked("openai+guarded", tmp_path)


def test_litellm_without_a_database_refuses_a_key_in_its_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MachineError, match="answers 500: it needs a key; set LLM_ENDPOINT_KEY"):
        asked("litellm", tmp_path)
    monkeypatch.setenv(KEY, "wrong")
    with pytest.raises(MachineError, match="answers 400: it refused the key in LLM_ENDPOINT_KEY"):
        asked("litellm", tmp_path)
    monkeypatch.setenv(KEY, "opensesame")
    assert asked("litellm", tmp_path).outcome == LOADED
    assert "error" in problems(asked("litellm+500", tmp_path))[0][1].lower()


def test_a_wrong_path_is_an_error_at_once_and_the_right_one_is_named(tmp_path: Path) -> None:
    with serving("openai", prefix="/llm") as (url, _):
        for wrong, write in (("/llm/more", "end the address with /llm"), ("", "end the address with /llm")):
            with pytest.raises(MachineError, match=f"there is no API under the address: .*404.*{write}"):
                with client(foreign(f"{url}{wrong}"), tmp_path) as served:
                    served.load()
    with serving("openai") as (url, _), client(foreign(f"{url}/else/v1"), tmp_path) as served:
        with pytest.raises(MachineError, match="leave its path out"):
            served.load()


def test_an_id_before_the_address_and_a_path_that_chooses_chat(tmp_path: Path) -> None:
    with serving("chat") as (url, seen):
        address = f"{MODEL}={url}/v1/chat/completions"
        with client(foreign(address, model="acme/else"), tmp_path) as served:
            result = served.load()
            chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
            assert served.ask({"kind": "generate", "text": chat, "max_new_tokens": 3})["kind"] == "value"
            refused = served.ask({"kind": "generate", "text": [1, 2], "max_new_tokens": 3})
    assert seen[-1]["messages"] == chat
    assert "this endpoint has only chats" in refused["error"]["message"]
    assert (result.outcome, problems(result)) == (LOADED, [])
    assert {request["path"] for request in seen} == {"/v1/chat/completions"}
    assert not any("chat template" in note for note in result.notes)


def test_tokens_without_usage_are_counted_by_tokenising(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_model, "load_tokenizer", lambda job: (split, ""))
    result = asked("openai+uncounted", tmp_path)
    assert "per_token" in result.metrics
    assert any("counted by tokenising the text here" in note for note in result.notes)


@pytest.mark.parametrize(("mode", "count"), [("vllm", 5), ("tgi", 5), ("openai", 5), ("openai+uncounted", None)])
def test_an_answer_has_the_endpoints_count_or_none(mode: str, count: int | None, tmp_path: Path) -> None:
    with serving(mode) as (url, _), client(foreign(url), tmp_path) as served:
        served.load()
        answer = served.ask({"kind": "generate", "text": "Hello", "max_new_tokens": 5})
    assert answer["count"] == count
    assert len(answer["tokens"]) == (5 if mode == "tgi" else 0)


def test_tokens_may_have_no_text(tmp_path: Path) -> None:
    """Parts of a character, for instance: the server says that it reached the limit of the request."""
    result = asked("openai+silent+uncounted+llama_cpp", tmp_path)
    assert (result.outcome, problems(result)) == (LOADED, [])
    assert not {"ttft", "per_token"} & set(result.metrics)
    assert problems(asked("openai+silent+uncounted", tmp_path)) == [
        ("tokens", "POST /v1/completions streamed no token at all")
    ]


def test_answers_in_lumps_are_in_no_figure() -> None:
    lump = Answer(0.0, stamps=[1.0] * 8, pieces=["w"] * 8, tokens=8, ended=1.0)
    assert "8 pieces of text came in 1 read: the server, or a proxy in front of it" in lump.lumps
    lump.starved = 0.6
    assert "since this client waited 0.6 of 1 s for a processor" in lump.lumps
    assert Answer(0.0, stamps=[1.0, 2.0, 3.0], pieces=["w"] * 3).lumps == ""


def test_each_reason_to_leave_answers_out_is_said_once() -> None:
    """With how many answers it is about, and the numbers of the first."""
    endpoint = Endpoint("http://127.0.0.1:9")
    times = RoundTimes(Vllm(endpoint, SelfDescription(endpoint)), Prompts(16, None, salted=False), 8)
    for pieces, starved, tokens in ((8, 0.0, 8), (7, 0.6, 8), (6, 0.7, 8), (3, 0.0, 3), (5, 0.0, 5)):
        answer = Answer(0.0, [1.0] * pieces, ["w"] * pieces, ended=1.0, tokens=tokens, starved=starved)
        times.add(Round([answer]))
    result = LoadResult(spec={}, outcome=LOADED)
    times.fill(result)
    (note,) = result.notes
    assert note == (
        "not in ttft and per_token: 2 answers stopped after 3 to 5 of 8 tokens: prompt and new tokens must fit into "
        "--max-model-len; 1 answer in lumps: 8 pieces of text came in 1 read: the server, or a proxy in front of it, "
        "buffers them (nginx: set proxy_buffering off); 2 answers in lumps: for example, 7 pieces of text came in 1 "
        "read, since this client waited 0.6 of 1 s for a processor"
    )
    assert note.endswith(result.unavailable["ttft"])


def test_what_an_endpoint_speaks_is_said(tmp_path: Path) -> None:
    with serving("openai") as (url, _), client(foreign(url.replace("http:", "https:")), tmp_path) as served:
        with pytest.raises(MachineError, match="it does not speak TLS: write http:// in place of https://"):
            served.load()


def test_a_server_that_speaks_tls_is_not_asked_without_it(tmp_path: Path) -> None:
    with serving("openai", tls=certificate(tmp_path)) as (url, _), client(foreign(url), tmp_path) as served:
        with pytest.raises(MachineError, match="the endpoint speaks TLS: write https:// in place of http://"):
            served.load()


def test_another_name_by_option(tmp_path: Path) -> None:
    own = (("model_id", '"org/model"'),)
    assert asked("openai", tmp_path, model="acme/else").outcome == NOT_APPLIED
    assert asked("openai", tmp_path, model="acme/else", options=own).outcome == LOADED


def test_a_key_goes_along_and_is_never_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match="answers 401: it needs a key; set LLM_ENDPOINT_KEY"):
        asked("openai+locked", tmp_path)
    monkeypatch.setenv(KEY, "opensesame")
    result = asked("openai+locked", tmp_path)
    assert result.outcome == LOADED
    assert "opensesame" not in json.dumps(result.to_json())


def test_a_body_is_read_as_it_came_and_quoted_without_secrets() -> None:
    """Control characters are escaped where a text is shown; a JSON text in which they are is none any more."""
    reply = Reply(400, '{"error": "no opensesame\x7f"}', hide=Endpoint("http://127.0.0.1:9", "opensesame").hide)
    assert reply.json() == {"error": "no opensesame\x7f"}
    assert reply.quoted == '{"error": "no ***\\x7f"}'


@pytest.mark.parametrize(
    ("mode", "check", "text"),
    [
        ("openai+other", "model", "the endpoint serves 'org/other', not 'org/model'"),
        ("tgi+other", "model", "the endpoint serves 'org/other', not 'org/model'"),
        ("openai+impostor", "model", "'org/model' was requested, but the answer is by 'org/impostor'"),
        ("openai+hangs-up", "stream", "2 pieces of text came, then the stream ended without its last event"),
        ("tgi+hangs-up", "stream", "2 pieces of text came, then the stream ended without its last event"),
        ("openai+500", "answers", "POST /v1/completions answered 500: Internal Server Error"),
        ("tgi+500", "answers", "POST /generate_stream answered 500: Internal Server Error"),
        ("openai+silent", "tokens", "POST /v1/completions streamed no token at all"),
        ("openai+page", "stream", "did not answer with a stream of events: text/html: <html>Welcome to nginx!</html>"),
        ("openai+garbage", "stream", "streamed an event that is not a JSON object: <<< not json >>>"),
        ("openai+error", "answers", "CUDA out of memory"),
    ],
)
def test_what_is_wrong_with_an_endpoint_is_said(mode: str, check: str, text: str, tmp_path: Path) -> None:
    result = asked(mode, tmp_path)
    assert result.outcome == NOT_APPLIED
    assert problems(result)[0][0] == check
    assert text in problems(result)[0][1]


def test_an_endpoint_that_is_not_there_is_the_machines_fault(tmp_path: Path) -> None:
    with serving("openai") as (url, _):
        pass
    with (
        pytest.raises(MachineError, match="the endpoint cannot be reached: Connection refused"),
        client(foreign(url), tmp_path) as served,
    ):
        served.load()


class Clock:
    """The clock of a module whose waits end as soon as the test says that their time is over."""

    def __init__(self) -> None:
        self.is_late = False

    def monotonic(self) -> float:
        return time.monotonic() + (1e6 if self.is_late else 0)

    def perf_counter(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        self.is_late = True


def test_an_endpoint_that_stalls_is_a_time_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, hung = Clock(), threading.Event()

    def read(self: wire.Wire, max_bytes: int, timeout: float | None = None) -> bytes:
        while True:
            clock.is_late = hung.is_set()
            with contextlib.suppress(httpcore.ReadTimeout):
                return self._stream.read(max_bytes, 0.05)
            self._exchange.left()

    with monkeypatch.context() as patch, serving("openai+hangs", hung=hung) as (url, _):
        patch.setattr(wire, "time", clock)
        patch.setattr(wire.Wire, "read", read)
        with (
            pytest.raises(Died, match="did not answer in time: a stream stopped in the middle") as caught,
            client(foreign(url), tmp_path) as served,
        ):
            served.load()
    assert caught.value.outcome == TIMEOUT
    # It looks once, and has waited for ever when it looks again.
    monkeypatch.setattr(finding, "time", Clock())
    with pytest.raises(Died, match="not healthy within 90% of --llm-timeout: GET /health answers 503: load") as caught:
        asked("openai+unhealthy", tmp_path)
    assert caught.value.outcome == TIMEOUT


# --- servers that are started ----------------------------------------------------------------------------------------


def test_a_started_server_of_another_kind(tmp_path: Path) -> None:
    small, large = started("openai", tmp_path), started("openai", tmp_path, megabytes=64)
    assert (small.outcome, problems(small)) == (LOADED, [])
    for name in ("server.settled", "server.peak"):
        assert large.metrics[name] - small.metrics[name] == pytest.approx(64 << 20, abs=8 << 20)


@pytest.mark.parametrize(
    ("mode", "outcome", "message", "log"),
    [
        ("crash", CRASHED, "the server exited with status 7 before it was healthy", "no such architecture"),
        ("openai+dies", CRASHED, "the server exited with status 3 in the middle of an answer", "device-side assert"),
        ("openai+segfaults", CRASHED, "the server was killed by SIGSEGV in the middle of an answer", ""),
    ],
)
def test_how_a_server_ended_is_said(mode: str, outcome: str, message: str, log: str, tmp_path: Path) -> None:
    with pytest.raises(Died) as caught:
        started(mode, tmp_path)
    assert caught.value.outcome == outcome
    assert message in str(caught.value)
    assert log in caught.value.info.log
    assert caught.value.signal == (signal.SIGSEGV if "segfaults" in mode else 0)


@pytest.mark.parametrize(
    ("mode", "seen", "port"),
    [
        ("deaf", "still compiling kernels", "Connection refused; no process listens on its port"),
        ("openai+unhealthy", "/health answers 503: loading", "GET /health answers 503: loading; its port is open"),
    ],
)
def test_a_server_that_is_never_healthy(
    mode: str, seen: str, port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is over once the server has come as far as it does."""
    clock = Clock()
    wait = server_process.ServerProcess.wait_until

    def wait_until(self: Any, healthy: Callable[[], str], deadline: float, is_open: Callable[[], bool]) -> None:
        def complaint() -> str:
            why = healthy()
            clock.is_late = seen in f"{why} {self.tail}"
            return why

        wait(self, complaint, deadline, is_open)

    monkeypatch.setattr(server_process, "time", clock)
    monkeypatch.setattr(server_process.ServerProcess, "wait_until", wait_until)
    with pytest.raises(Died) as caught:
        started(mode, tmp_path, timeout=600.0)
    assert caught.value.outcome == TIMEOUT
    assert re.search(rf"the server was not healthy after [45]\d\d(\.\d)? s: {port}$", str(caught.value))
    assert "loading the model" in caught.value.info.log


def test_a_server_dies_with_its_owner(tmp_path: Path) -> None:
    """Even if the owner is killed: the kernel sees to it."""
    pid_file = tmp_path / "pid"
    pid = os.fork()
    if pid == 0:
        from pytest_llmload.process.serving.server_process import ServerProcess

        os.setsid()
        own = ServerProcess([sys.executable, str(FAKE), "0", "openai"], tmp_path / "log")
        pid_file.with_suffix(".new").write_text(str(own.pid))
        pid_file.with_suffix(".new").rename(pid_file)
        signal.pause()
    while not pid_file.exists():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    descriptor = os.pidfd_open(int(pid_file.read_text()))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    import select

    assert select.select([descriptor], [], [], 60)[0]
    os.close(descriptor)


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5, 16, 128, 777])
def test_prompts_have_the_workloads_length(length: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(loads.checkpoint("tiny-llama").path)
    prompts = Prompts(length, tokenizer, salted=False)
    texts = [prompts.next() for _ in range(4)]
    if length > 4:
        assert [prompts.count(text) for text in texts] == [length] * 4
        assert len(set(texts)) == 4
    assert len(Prompts(length, None, salted=True).next().split()) == length


def test_the_time_to_the_first_token_begins_when_the_request_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other clients keep their connection; making one is no part of a token's time."""
    moments = []
    connect = httpcore.SyncBackend.connect_tcp

    def connecting(*arguments: Any, **named: Any) -> Any:
        made = connect(*arguments, **named)
        moments.append(time.perf_counter())
        return made

    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connecting)
    with serving("openai") as (url, _):
        events = list(Endpoint(url).events("/v1/completions", {"model": MODEL, "max_tokens": 2, "stream": True}))
    (made,) = moments
    first, *_ = events
    assert isinstance(first, Event)
    assert made < first.sent < first.read
    assert {event.sent for event in events if isinstance(event, Event)} == {first.sent}


@pytest.mark.parametrize("where", ["srv          init", "main"])
def test_the_start_of_llama_server_in_its_log(where: str) -> None:
    endpoint = Endpoint("http://127.0.0.1:9")
    kind = LlamaServer(endpoint, SelfDescription(endpoint))
    log = (
        f"0.00.009.999 I {where}: loading model\n1.02.345.678 I {where}: model loaded\n1.02.346.000 I {where}: ready\n"
    )
    assert kind.phases_of(log) == {"start.model": 62.345}
    assert kind.phases_of("loading\n") == {}


def test_the_start_of_vllm_in_its_log() -> None:
    endpoint = Endpoint("http://127.0.0.1:9")
    kind = Vllm(endpoint, SelfDescription(endpoint))
    log = (
        "(Worker pid=7) INFO 11-29 20:20:09 [default_loader.py:501] Loading weights took 0.04 seconds\n"
        "(Worker pid=7) INFO 11-29 20:20:09 [gpu_model_runner.py:2653] Model loading took 2.30 GiB and 1.25 seconds\n"
        "(EngineCore pid=6) INFO 11-29 20:20:12 [core.py:402] init engine (profile, create kv cache, warmup model) "
        "took 2.67 s\n"
    )
    assert kind.phases_of(log) == {"start.weights": 0.04, "start.model": 1.25, "start.engine": 2.67}


def test_the_command_line_of_a_server() -> None:
    options = (("cb_block_size", "64"), ("compile", "false"), ("continuous_batching", "true"))
    job = loads.job("tiny-llama", strategy="served", dtype="bf16", quant="int8", attn="sdpa", options=options)
    arguments = launch.command(job, 1234)
    assert arguments[arguments.index("serve") + 1] == job.checkpoint.path
    text = " ".join(arguments)
    for piece in (
        "--host 127.0.0.1 --port 1234 --device cpu --dtype bfloat16 --quantization bnb-8bit",
        "--attn-implementation sdpa",
        "--cb-block-size 64",
        "--continuous-batching",
    ):
        assert piece in text
    assert "--compile" not in text
    assert "--trust-remote-code" not in text
