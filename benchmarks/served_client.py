"""Time to first token and per token of a running server, by our client and by independent ones, in turn.

    python benchmarks/served_client.py URL MODEL --tokenizer DIR [--aiperf PROGRAM] [--rounds 5] [--turn 10]

The independent clients are the ``openai`` package and, from an environment of its own, aiperf. In a round each client
sends the same ``--turn`` prompts one after another, after one that warms it up; the order changes from round to round,
so that what the machine does beside it is in all of them. With the same prompts the same tokens have no text of their
own, which otherwise moves the first text by whole tokens; therefore start the server without a cache of prompts (vLLM
``--no-enable-prefix-caching``, llama-server ``--no-cache-prompt``).

The table has medians and ranges over all rounds, and our median over that of each other client. On a busy machine the
server itself is slower for one client than for the next, above all for aiperf, whose processes take from it what they
need: therefore each client's mean is also given over the server's own, by its metrics, and where there are such, these
ratios are compared. The last line says whether all are within 5 %. The key is read from LLM_ENDPOINT_KEY.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import openai
from transformers import AutoTokenizer

from pytest_llmload.process.serving.counting import count, per_token
from pytest_llmload.process.serving.finding import KEY, look
from pytest_llmload.process.serving.http import Endpoint
from pytest_llmload.process.serving.prompts import Prompts
from pytest_llmload.process.serving.servers.base import ServerKind

LIMIT = 0.05
#: Seconds of all prompts and of all further tokens so far, in the metrics of vLLM and of llama-server.
SECONDS = (
    ("vllm:time_to_first_token_seconds_sum", "vllm:inter_token_latency_seconds_sum"),
    ("llamacpp:prompt_seconds_total", "llamacpp:tokens_predicted_seconds_total"),
)
OURS = "ours"
#: Seconds to the first token, and of each further one.
Times = tuple[float, float]


def ours(kind: ServerKind, prompts: Prompts, text: str, tokens: int) -> Times:
    """Return the times of one request, as a load measures them."""
    answer = kind.answer(text, tokens)
    counted = count(kind, prompts, answer, tokens)
    assert counted is not None, "the server does not count its tokens"
    assert counted.tokens == tokens, counted
    pace = per_token(prompts, answer, counted.tokens)
    assert pace is not None, answer.lumps or "one piece"
    return answer.stamps[0] - answer.sent, pace


def by_openai(client: openai.OpenAI, model: str, text: str, tokens: int) -> Times:
    """Return the same by the openai package: first chunk with text, last chunk, the tokens of ``usage``."""
    sent = time.perf_counter()
    first = last = 0.0
    generated = 0
    extra = {"ignore_eos": True, "min_tokens": tokens}
    stream = client.completions.create(
        model=model,
        prompt=text,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    for chunk in stream:
        now = time.perf_counter()
        if chunk.choices and chunk.choices[0].text:
            first = first or now
            last = now
        if chunk.usage is not None:
            generated = chunk.usage.completion_tokens
    assert generated == tokens, f"{generated} of {tokens} tokens"
    return first - sent, (last - first) / (generated - 1)


def by_aiperf(program: str, options: argparse.Namespace, key: str, texts: list[str]) -> list[Times]:
    """Return the times of several requests by aiperf; the first text warms it up."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.jsonl")
        prompts.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts), encoding="utf-8")
        fields = {"max_tokens": options.tokens, "min_tokens": options.tokens, "ignore_eos": "true", "temperature": 0}
        command = [program, "profile", "--model", options.model, "--url", options.url, "--endpoint-type", "completions"]
        command += ["--streaming", "--tokenizer", options.tokenizer, "--use-server-token-count"]
        command += ["--input-file", str(prompts), "--custom-dataset-type", "single_turn"]
        command += ["--warmup-request-count", "1", "--request-count", str(len(texts) - 1), "--concurrency", "1"]
        command += [word for name, value in fields.items() for word in ("--extra-inputs", f"{name}:{value}")]
        command += ["--workers-max", "1", "--record-processors", "1", "--no-server-metrics", "--no-gpu-telemetry"]
        command += ["--artifact-dir", folder, "--ui", "none", *(["--api-key", key] if key else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        records = Path(folder, "profile_export.jsonl")
        if done.returncode != 0 or not records.exists():
            raise SystemExit(f"aiperf ended with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        rows = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    times = []
    for row in rows:
        if row["metadata"]["benchmark_phase"] != "profiling" or row.get("error"):
            continue
        found = {name: figure["value"] for name, figure in row["metrics"].items()}
        assert found["output_sequence_length"] == options.tokens, found["output_sequence_length"]
        times.append((found["time_to_first_token"] / 1e3, found["inter_token_latency"] / 1e3))
    return times


def counted_by_server(endpoint: Endpoint) -> list[float]:
    """Return the seconds of all prompts and of all further tokens so far, by the server; nothing where it has none."""
    reply = endpoint.get("/metrics")
    values = {}
    for line in reply.body.splitlines() if reply.status == 200 else ():
        name, _, value = line.rpartition(" ")
        values[name.partition("{")[0]] = float(value) if not line.startswith("#") else 0.0
    rows = (names for names in SECONDS if names[0] in values)
    return [values[name] for name in next(rows, ())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--tokenizer", required=True, help="folder of the model's tokenizer")
    parser.add_argument("--aiperf", help="program of aiperf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    options = parser.parse_args()
    key = os.environ.get(KEY, "")
    endpoint = Endpoint(options.url, key)
    endpoint.deadline = time.monotonic() + 3600
    kind, complaint = look(endpoint, "completions", ours=False, key=key)
    assert not complaint, complaint
    kind.model = options.model
    prompts = Prompts(options.prompt, AutoTokenizer.from_pretrained(options.tokenizer), salted=True)
    openai_client = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=key or "none")
    clients: dict[str, Callable[[list[str]], list[Times]]] = {
        OURS: lambda texts: [ours(kind, prompts, text, options.tokens) for text in texts][1:],
        f"openai {version('openai')}": lambda texts: [
            by_openai(openai_client, options.model, text, options.tokens) for text in texts
        ][1:],
    }
    if options.aiperf:
        told = subprocess.run([options.aiperf, "--version"], capture_output=True, text=True, check=True).stdout
        clients[f"aiperf {told.split()[-1]}"] = lambda texts: by_aiperf(options.aiperf, options, key, texts)
    rounds: dict[str, list[list[Times]]] = {name: [] for name in clients}
    by_server: dict[str, list[list[float]]] = {name: [] for name in clients}
    names = list(clients)
    for number in range(options.rounds):
        first = number % len(names)
        texts = [prompts.next() for _ in range(options.turn + 1)]
        for name in names[first:] + names[:first]:
            before = counted_by_server(endpoint)
            rounds[name].append(clients[name](texts))
            passed = [now - then for now, then in zip(counted_by_server(endpoint), before, strict=True)]
            by_server[name].append(passed)
    print(f"{kind.about().server or kind.name}: prompts of {options.prompt} tokens, {options.tokens} new tokens")
    held = True
    for place, what in enumerate(("ttft", "per_token")):
        each = (options.turn + 1) * options.rounds * (1 if what == "ttft" else options.tokens - 1)
        medians, over = {}, {}
        for name, turns in rounds.items():
            every = [times[place] for turn in turns for times in turn]
            medians[name] = statistics.median(every)
            text = f"{what:<10}{name:<14}{len(every):>4} requests, median {1e3 * medians[name]:9.3f} ms"
            text += f" ({1e3 * min(every):.3f} to {1e3 * max(every):.3f})"
            ratio = medians[OURS] / medians[name]
            if all(by_server[name]):
                server = sum(passed[place] for passed in by_server[name]) / each
                over[name] = statistics.fmean(every) / server
                text += f"; mean over the server's own {1e3 * server:.3f} ms: {over[name]:.3f}"
            if name != OURS:
                text += f"; ours over it {ratio:.3f}"
                ratio = over[OURS] / over[name] if name in over else ratio
                text += f", with the server's own alike {ratio:.3f}" if name in over else ""
                held &= abs(ratio - 1) <= LIMIT
            print(text)
    print("within 5 %" if held else "not within 5 %")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
