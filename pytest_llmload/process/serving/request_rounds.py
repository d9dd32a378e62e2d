"""What is measured of an endpoint: streams one at a time, then eight at once."""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter

from pytest_llmload.core.results import LoadResult
from pytest_llmload.process.serving.api import Answer, Api
from pytest_llmload.process.serving.prompts import Prompts

#: Rounds of one request, and the seconds after which no other is started.
ROUNDS = 5
BUDGET = 30.0
#: Requests at once, and how often.
MANY, MANY_ROUNDS = 8, 2
_NO_COUNT = "the stream does not count its tokens (no usage in it), and a piece of text is not a token"


@dataclass
class Round:
    """Requests that were sent at once."""

    answers: list[Answer]

    @property
    def seconds(self) -> float:
        """From the first request sent to the last answer's end."""
        return max(answer.ended for answer in self.answers) - min(answer.sent for answer in self.answers)


@dataclass
class Streams:
    """All answers that were timed."""

    prompts: Prompts
    single: list[Round] = field(default_factory=list)
    many: list[Round] = field(default_factory=list)

    def fill(self, result: LoadResult) -> None:
        """Write the times, or why there are none."""
        for rounds, suffix in ((self.single, ""), (self.many, f".x{MANY}")):
            prefix = "served." if suffix else ""
            answers = [answer for part in rounds for answer in part.answers]
            firsts = [answer.stamps[0] - answer.sent for answer in answers if answer.stamps]
            _write(result, f"{prefix}ttft{suffix}", firsts, "no answer had any text")
            further = [seconds for answer in answers if (seconds := self.per_token(answer)) is not None]
            _write(result, f"{prefix}per_token{suffix}", further, _why_none(answers))
        _write(result, f"served.total.x{MANY}", [part.seconds for part in self.many], "")

    def per_token(self, answer: Answer) -> float | None:
        """Seconds per token after those in the first piece of text; None where there is no more than one piece."""
        if answer.tokens is None or len(answer.stamps) < 2:
            return None
        first = self.prompts.count(answer.pieces[0]) if not answer.ids else 1
        further = answer.tokens - min(max(first or 1, 1), answer.tokens - 1)
        return (answer.stamps[-1] - answer.stamps[0]) / further


def _why_none(answers: list[Answer]) -> str:
    return _NO_COUNT if all(answer.tokens is None for answer in answers) else "every answer came in one piece"


def _write(result: LoadResult, name: str, samples: list[float], why: str) -> None:
    if samples:
        result.samples[name] = samples
        result.metrics[name] = statistics.median(samples)
    else:
        result.unavailable[name] = why


def run(api: Api, prompts: Prompts, new_tokens: int, batch: int) -> Streams:
    """The rounds, after a first one that warmed everything up. Raises what a request raises."""
    streams = Streams(prompts)
    begin = perf_counter()
    while len(streams.single) < ROUNDS and (len(streams.single) < 2 or perf_counter() - begin < BUDGET):
        streams.single.append(at_once(api, prompts, new_tokens, batch))
    begin = perf_counter()
    while len(streams.many) < MANY_ROUNDS and (not streams.many or perf_counter() - begin < BUDGET / 2):
        streams.many.append(at_once(api, prompts, new_tokens, MANY))
    return streams


def at_once(api: Api, prompts: Prompts, new_tokens: int, count: int) -> Round:
    """So many requests at the same time, each from a thread of its own."""
    texts = [prompts.next() for _ in range(count)]
    if count == 1:
        return Round([api.answer(texts[0], new_tokens)])
    with ThreadPoolExecutor(count) as pool:
        return Round(list(pool.map(lambda text: api.answer(text, new_tokens), texts)))
