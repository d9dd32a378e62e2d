"""Measure an endpoint's times: first one stream at a time, then eight at once."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter

from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import Workload
from pytest_llmload.core.units import counted
from pytest_llmload.process.serving.answers import Answer, CutOff
from pytest_llmload.process.serving.counting import count, per_token
from pytest_llmload.process.serving.prompts import Prompts
from pytest_llmload.process.serving.servers.base import ServerKind

#: Rounds of one request: normally, and if fewer are enough.
ROUNDS, FEWER_ROUNDS = 5, 3
BUDGET = 30.0
#: The number of simultaneous requests, and of their rounds.
MANY, MANY_ROUNDS = 8, 2
_NO_COUNT = (
    "the stream does not count its tokens (no usage in it), there is no tokenizer of the model on this machine, and a "
    "piece of text is not a token"
)


@dataclass
class Round:
    """Requests that were sent at once."""

    answers: list[Answer]
    #: The requests whose answers the server cut off.
    cut_off: list[CutOff] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Return the seconds from the first request to the end of the last answer."""
        return max(answer.ended for answer in self.answers) - min(answer.sent for answer in self.answers)


@dataclass
class RoundTimes:
    """The times of some rounds, taken from answers with all requested tokens only."""

    kind: ServerKind
    prompts: Prompts
    new_tokens: int
    ttft: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    #: What is left out: answers that were cut off, the tokens of those that stopped early, and those in lumps.
    cut_off: list[CutOff] = field(default_factory=list)
    short: list[int] = field(default_factory=list)
    lumped: list[Answer] = field(default_factory=list)
    #: Why answers with a time to the first token have no time per token -> how many.
    without_pace: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add(self, part: Round) -> None:
        """Add the times of a round."""
        self.cut_off += part.cut_off
        if part.cut_off:
            # The other answers were not generated at the requested concurrency.
            return
        whole = [self._take(answer) for answer in part.answers]
        if all(whole):
            self.total.append(part.seconds)

    def _take(self, answer: Answer) -> bool:
        """Add the times of an answer; return true if it has all of its tokens."""
        counted = count(self.kind, self.prompts, answer, self.new_tokens)
        if counted is not None and counted.tokens < self.new_tokens:
            self.short.append(counted.tokens)
            return False
        if counted is not None and counted.by:
            self.notes.append(f"the stream does not count its tokens; they are counted {counted.by}")
        if answer.lumps:
            self.lumped.append(answer)
            return True
        if answer.stamps:
            self.ttft.append(answer.stamps[0] - answer.sent)
        pace = per_token(self.prompts, answer, counted.tokens) if counted is not None else None
        if pace is None:
            self.without_pace[_NO_COUNT if counted is None else "every answer came in one piece"] += 1
        else:
            self.per_token.append(pace)
        return True

    def fill(self, result: LoadResult, suffix: str = "") -> None:
        """Write the times, or why there are none, and how many answers are left out."""
        prefix = "served." if suffix else ""
        why = "; ".join(self._left_out())
        _write(result, f"{prefix}ttft{suffix}", self.ttft, why or "no answer had any text")
        pace = "; ".join(filter(None, [*self.without_pace, why]))
        _write(result, f"{prefix}per_token{suffix}", self.per_token, pace or "no answer had any text")
        if suffix:
            _write(result, f"served.total{suffix}", self.total, why)
        if why:
            result.notes.append(f"not in {prefix}ttft{suffix} and {prefix}per_token{suffix}: {why}")
        result.notes += dict.fromkeys(self.notes)

    def _left_out(self) -> Iterator[str]:
        """Yield a text for each reason to leave answers out: how many there are, and the numbers of one of them."""
        if self.cut_off:
            yield f"{counted(len(self.cut_off), 'answer')} cut off: {self.kind.cut_off} ({self.cut_off[0]})"
        if self.short:
            fewest, most = min(self.short), max(self.short)
            tokens = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            stopped = (
                f"{counted(len(self.short), 'answer')} stopped after {tokens} of {counted(self.new_tokens, 'token')}"
            )
            yield f"{stopped}: {self.kind.stops_early}"
        for alike in ([each for each in self.lumped if each.is_starved is starved] for starved in (False, True)):
            if alike:
                yield f"{counted(len(alike), 'answer')} in lumps: {'for example, ' * (len(alike) > 1)}{alike[0].lumps}"


def _write(result: LoadResult, name: str, samples: list[float], why: str) -> None:
    if samples:
        result.samples[name] = samples
        result.metrics[name] = statistics.median(samples)
    else:
        result.unavailable[name] = why


def run(kind: ServerKind, prompts: Prompts, workload: Workload, result: LoadResult, *, fewer: bool) -> None:
    """Measure after a first answer, which warms everything up. Raises what a single request raises.

    ``fewer`` runs fewer rounds, which are enough if the measurement is one of several.
    """
    new_tokens = workload.new_tokens
    rounds, many_rounds = (FEWER_ROUNDS, 1) if fewer else (ROUNDS, MANY_ROUNDS)
    single = RoundTimes(kind, prompts, new_tokens)
    for part in _rounds(kind, prompts, new_tokens, workload.batch, rounds, BUDGET):
        single.add(part)
    single.fill(result)
    many = RoundTimes(kind, prompts, new_tokens)
    for part in _rounds(kind, prompts, new_tokens, MANY, many_rounds, BUDGET / 2):
        many.add(part)
    many.fill(result, f".x{MANY}")


def _rounds(
    kind: ServerKind, prompts: Prompts, new_tokens: int, count: int, rounds: int, budget: float
) -> Iterable[Round]:
    begin = perf_counter()
    for number in range(rounds):
        if number and perf_counter() - begin > budget:
            break
        yield at_once(kind, prompts, new_tokens, count)


def at_once(kind: ServerKind, prompts: Prompts, new_tokens: int, count: int) -> Round:
    """Send ``count`` requests at the same time, each from its own thread. Raises CutOff if a single one is cut off."""
    texts = [prompts.next() for _ in range(count)]
    if count == 1:
        return Round([kind.answer(texts[0], new_tokens)])

    def ask(text: str) -> Answer | CutOff:
        try:
            return kind.answer(text, new_tokens)
        except CutOff as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        ended = list(pool.map(ask, texts))
    answers = [answer for answer in ended if isinstance(answer, Answer)]
    return Round(answers, [error for error in ended if isinstance(error, CutOff)])
