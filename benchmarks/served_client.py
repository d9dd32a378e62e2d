"""Time to first token and per token of a running server, by our client and by an independent one, in turn.

    python benchmarks/served_client.py URL MODEL [--rounds 20] [--tokens 64] [--prompt 128]

The independent client is ``openai``'s; it asks for the same prompts and as many tokens. Both take turns, and who is
first changes from round to round, so that what the machine does beside it is in both. The table has medians and their
ratios; the last line says whether both are within 5 %. The key is read from LLM_ENDPOINT_KEY.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import openai

from pytest_llmload.process.serving.counting import count, per_token
from pytest_llmload.process.serving.finding import KEY, look
from pytest_llmload.process.serving.http import Endpoint
from pytest_llmload.process.serving.prompts import Prompts
from pytest_llmload.process.serving.servers.base import ServerKind

LIMIT = 0.05
Times = tuple[float, float]


def ours(kind: ServerKind, prompts: Prompts, text: str, tokens: int) -> Times:
    """Return seconds to the first token and of each further one, as a load measures them."""
    answer = kind.answer(text, tokens)
    counted = count(kind, prompts, answer, tokens)
    assert counted is not None, "the server does not count its tokens"
    assert counted.tokens == tokens, counted
    pace = per_token(prompts, answer, counted.tokens)
    assert pace is not None, answer.lumps or "one piece"
    return answer.stamps[0] - answer.sent, pace


def theirs(client: openai.OpenAI, model: str, text: str, tokens: int) -> Times:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    options = parser.parse_args()
    key = os.environ.get(KEY, "")
    endpoint = Endpoint(options.url, key)
    endpoint.deadline = time.monotonic() + 3600
    kind, complaint = look(endpoint, "completions", ours=False, key=key)
    assert not complaint, complaint
    kind.model = options.model
    # Words, each a token or more: both clients send the same text in a round, and no text twice to one cache.
    prompts = Prompts(options.prompt, None, salted=True)
    client = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=key or "none")
    clients: dict[str, Callable[[], Times]] = {
        "ours": lambda: ours(kind, prompts, prompts.next(), options.tokens),
        "openai": lambda: theirs(client, options.model, prompts.next(), options.tokens),
    }
    taken: dict[str, list[Times]] = {name: [] for name in clients}
    for number in range(options.rounds + 1):
        for name in sorted(clients, reverse=bool(number % 2)):
            times = clients[name]()
            # The first round warms both up.
            if number:
                taken[name].append(times)
    print(f"{kind.about().server or kind.name}: medians of {options.rounds} requests, {options.tokens} tokens each")
    held = True
    for place, what in enumerate(("ttft", "per_token")):
        medians = {name: statistics.median(times[place] for times in taken[name]) for name in clients}
        ratios = [mine[place] / other[place] for mine, other in zip(taken["ours"], taken["openai"], strict=True)]
        ratio = medians["ours"] / medians["openai"]
        held &= abs(ratio - 1) <= LIMIT
        shown = "  ".join(f"{name} {value * 1e3:9.3f} ms" for name, value in medians.items())
        print(f"{what:<10}{shown}  ratio {ratio:.3f}  (of pairs, median {statistics.median(ratios):.3f})")
    print("within 5 %" if held else "not within 5 %")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
