"""A load by a model server: start or find the server, send requests, and check and measure it from outside."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from pytest_llmload.core import results
from pytest_llmload.core.endpoint_address import EndpointAddress
from pytest_llmload.core.job import Job
from pytest_llmload.core.results import NOT_APPLIED, ErrorInfo, LoadResult, Problem
from pytest_llmload.core.units import counted
from pytest_llmload.probes.own import declared_by, own_probes
from pytest_llmload.process.serving import endpoint_checks, finding, launch, memory, request_rounds, server_memory
from pytest_llmload.process.serving.answers import About, Answer, BadAnswer
from pytest_llmload.process.serving.finding import KEY
from pytest_llmload.process.serving.first_answer import first_answer
from pytest_llmload.process.serving.http import Endpoint, HungUp, Late, Unreachable
from pytest_llmload.process.serving.local_tokenizer import load_tokenizer
from pytest_llmload.process.serving.prompts import Prompts
from pytest_llmload.process.serving.server_environment import server_environment
from pytest_llmload.process.serving.server_process import HOST, ServerProcess, free_port
from pytest_llmload.process.serving.servers.base import SelfDescription, ServerKind
from pytest_llmload.strategies.served import Served as Declaration
from pytest_llmload.system.process_exit import Died
from pytest_llmload.system.protocol import Message
from pytest_llmload.worker.model.prompts import Prompt, chat_text, is_chat, without_bos

#: Share of ``--llm-timeout`` after which the load ends itself, so that it can report what it waited for.
_PART = 0.9
#: Seconds to wait for a server's end after it closed the connection in the middle of an answer, and after it answered
#: an error: vLLM's API server does so when its engine has died, and then ends in its own time.
_ENDING, _ENDING_AFTER_ERROR = 3.0, 10.0
_INSIDE = "the model is in a server, whose processes cannot be inspected"
_FOREIGN = "this run did not start the endpoint, so that its load and its hardware are unknown"
_NO_CACHE = "the server does not report the capacity of a cache"


class ServedModel:
    """The client of one endpoint, and the owner of its server if the load starts one."""

    def __init__(self, job: Job, tell: Callable[[str], None], log: Path) -> None:
        self._job = job
        self._tell = tell
        self._log = log
        self._foreign = bool(job.endpoint)
        #: True for a ``transformers serve`` that the load starts, whose settings are all known.
        self._ours = not self._foreign and job.spec.option("command") is None
        self._key = "" if self._ours else os.environ.get(KEY, "")
        self._server: ServerProcess | None = None
        self._phase = "start"
        self._tokenizer: Any = None
        self._kind: ServerKind | None = None
        self._result = self._new_result()
        # Set before the server starts, since its start may hang.
        faulthandler.unregister(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, self._dump)

    def _new_result(self) -> LoadResult:
        digests = {"shape": self._job.checkpoint.shape, "weights": self._job.checkpoint.weights}
        return LoadResult(spec=self._job.spec.to_json(), outcome=results.LOADED, digests=digests)

    # --- the messages of a load's process ------------------------------------------------------------------------

    def load(self) -> LoadResult:
        """Start, check and measure. Raises Died, and MachineError if a running endpoint cannot be used."""
        deadline = time.monotonic() + _PART * self._job.timeout
        with self._answered():
            kind = self._begin(deadline)
            if kind is not None and self._job.measure and self._job.generates:
                self._measure(kind)
        return self._complete()

    def repeat(self, job: Job) -> LoadResult:
        """Measure a running endpoint again, for the figures of a different job; the server is the same as before.

        Raises the same errors as :meth:`load`.
        """
        assert self._kind is not None
        self._job, self._result = job, self._new_result()
        self._endpoint.deadline = time.monotonic() + _PART * job.timeout
        with self._answered():
            self._kind.says = SelfDescription(self._endpoint)
            self._about(self._kind.about())
            if job.measure and job.generates:
                self._measure(self._kind)
        return self._complete()

    def _complete(self) -> LoadResult:
        result = self._result
        pid = self._server.pid if self._server is not None else None
        result.environment |= server_environment(self._job, pid, ours=self._ours)
        result.notes = list(dict.fromkeys([*result.notes, *(self._kind.notes if self._kind is not None else ())]))
        why = _FOREIGN if self._foreign else _INSIDE
        result.declared = declared_by(own_probes(self._job))
        missing = [name for name in result.table if name not in result.metrics and name not in result.unavailable]
        result.unavailable |= dict.fromkeys((*missing, "manifest", "numbers"), why)
        if result.problems:
            result.outcome = NOT_APPLIED
        return result

    def ask(self, message: Message) -> Message:
        """Answer ``generate`` through the endpoint. Raises RuntimeError for requests for the model itself, and Died."""
        if message["kind"] != "generate":
            return {**_error(Declaration.no_model), "changed": False}
        self._enter("generate")
        self._endpoint.deadline = time.monotonic() + _PART * self._job.timeout
        before = len(self._result.problems)
        assert self._kind is not None
        try:
            prompt = self._prompt_of(self._kind, message["text"])
        except ValueError as error:
            return _error(str(error))
        with self._answered():
            answer = self._kind.answer(prompt, message["max_new_tokens"])
            told = (
                answer.tokens
                if answer.tokens is not None
                else self._kind.told_tokens(answer, message["max_new_tokens"])
            )
            return {"kind": "value", "tokens": self._ids(answer, told), "text": answer.text, "count": told}
        return _error(self._result.problems[before].message)

    def _prompt_of(self, kind: ServerKind, prompt: Prompt) -> Prompt:
        """Return a prompt as an endpoint takes it. Raises ValueError if the endpoint cannot be given it."""
        if kind.chat and not isinstance(prompt, str) and not is_chat(prompt):
            raise ValueError("this endpoint has only chats, which take text or messages, not token ids")
        if kind.chat or not is_chat(prompt):
            return prompt
        return without_bos(self._tokenizer, chat_text(self._tokenizer, "its files are not on this machine", prompt))

    def close(self) -> None:
        """Stop the server that the load started; an endpoint that ran before keeps running."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    # --- beginning -----------------------------------------------------------------------------------------------

    def _begin(self, deadline: float) -> ServerKind | None:
        """Return an endpoint that is healthy and has answered once; None if it serves a different model."""
        job = self._job
        with self._timed("tokenizer"):
            self._tokenizer, why = load_tokenizer(job)
            self._result.notes += filter(None, [why])
        if self._foreign:
            self._endpoint = Endpoint(EndpointAddress.parse(job.endpoint).url, self._key)
        else:
            self._set_page_cache()
            port = free_port()
            self._endpoint = Endpoint(f"http://{HOST}:{port}", self._key)
        self._endpoint.deadline = deadline
        begin = perf_counter()
        with self._timed("start"):
            if not self._foreign:
                self._server = ServerProcess(launch.command(job, port), launch.log_of(self._log))
            kind = self._kind = self._healthy(deadline)
        with self._timed("first_answer"):
            about = kind.about()
            self._about(about)
            self._prompts = Prompts(job.spec.workload.prompt_tokens, self._tokenizer, salted=self._foreign)
            # Some servers load the model only now: a server is not ready until it has answered.
            prompt = self._prompts.next()
            answer = first_answer(job, self._result, self._endpoint, kind, about, prompt, self._key)
        if answer is None:
            return None
        # A proxy reports its version with an answer.
        self._about(kind.about())
        if not self._foreign and job.measure:
            self._result.metrics["load"] = perf_counter() - begin
            self._result.samples["load"] = [self._result.metrics["load"]]
        if self._server is not None:
            self._result.phases |= kind.phases_of(self._server.output)
        if not kind.renames:
            self._result.problems += endpoint_checks.answered_by(job, answer, kind.model)
        return kind

    def _healthy(self, deadline: float) -> ServerKind:
        """Return the kind of server, once it is healthy."""
        if self._server is None:
            address = EndpointAddress.parse(self._job.endpoint)
            api = str(self._job.spec.option("api") or address.api or "")
            return finding.wait(self._endpoint, api, self._key, deadline, f"{_PART:.0%} of --llm-timeout")
        api = str(self._job.spec.option("api") or "")
        return finding.wait_for_start(self._server, self._endpoint, api, self._key, deadline, ours=self._ours)

    def _about(self, about: About) -> None:
        if about.server:
            self._result.environment["server"] = about.server
        if about.revision:
            self._result.environment["revision"] = about.revision
        if about.cache_tokens is not None:
            self._result.metrics["kv_cache.tokens"] = about.cache_tokens
        else:
            self._result.unavailable["kv_cache.tokens"] = _NO_CACHE

    # --- measuring -----------------------------------------------------------------------------------------------

    def _measure(self, kind: ServerKind) -> None:
        job, result = self._job, self._result
        workload = job.spec.workload
        if self._server is not None and job.checks:
            result.metrics["server.settled"] = memory.settled(self._server.pid)
        if job.checks:
            self._enter("applied")
            prompt = self._prompts.next()
            answer = kind.answer(prompt, workload.new_tokens)
            result.problems += endpoint_checks.counted(kind, self._prompts, prompt, answer)
            self._other_prompt(answer)
        with self._timed("generate"):
            request_rounds.run(kind, self._prompts, workload, result, fewer=not job.checks)
        if self._server is not None and job.checks:
            self._server.check("while it was measured")
            server_memory.measure(job, result, self._server.pid)
            if self._ours and kind.as_told and self._tokenizer is not None:
                self._compare(prompt, answer)

    def _compare(self, prompt: str, answer: Answer) -> None:
        """Compare an answer with the reference, after all measurements, since the reference takes memory of its own."""
        from pytest_llmload.process.serving import reference

        with self._timed("reference"):
            problems, note = reference.check(self._job, self._tokenizer, prompt, answer.text)
        self._result.problems += problems
        self._result.notes += filter(None, [note])

    def _other_prompt(self, answer: Answer) -> None:
        """Add a note if the prompt has a different length from the workload's."""
        workload = self._job.spec.workload
        if answer.prompt_tokens is not None and answer.prompt_tokens != workload.prompt_tokens:
            why = "there is no tokenizer here" if self._tokenizer is None else "a template"
            self._result.notes.append(
                f"the endpoint counts {counted(answer.prompt_tokens, 'token')} in the prompt, the workload's prompt "
                f"has {workload.prompt_tokens}: {why}"
            )

    # --- what else -----------------------------------------------------------------------------------------------

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Turn errors of an answer into problems of the load, and the server's end into Died."""
        try:
            yield
        except BadAnswer as error:
            if error.problem.check == "answers" and self._server is not None:
                # What it printed at the error; its end may be long and say nothing.
                when = f"(phase '{self._phase}') after this answer: {error}"
                self._server.check(when, _ENDING_AFTER_ERROR, with_its_end=False)
            self._look("while it answered")
            self._result.problems.append(error.problem)
        except (HungUp, Unreachable) as error:
            self._look("in the middle of an answer", _ENDING)
            self._result.problems.append(Problem("stream", str(error)))
        except Late as error:
            message = f"the endpoint did not answer in time: {error}"
            log = self._server.tail if self._server is not None else ""
            raise Died(ErrorInfo(message=message, log=log, phase=self._phase), outcome=results.TIMEOUT) from None

    def _look(self, when: str, seconds: float = 0.0) -> None:
        if self._server is not None:
            self._server.check(f"{when} (phase '{self._phase}')", seconds)

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._tell(phase)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self._enter(phase)
        begin = perf_counter()
        yield
        self._result.phases[phase] = perf_counter() - begin

    def _set_page_cache(self) -> None:
        from pytest_llmload.system.page_cache import set_page_cache

        found = set_page_cache(self._job.checkpoint.path, self._job.page_cache)
        self._result.environment["page_cache"] = found

    def _ids(self, answer: Answer, told: int | None) -> list[int]:
        """Return the ids of an answer, as the protocol reports them, or else by tokenising its text.

        Return none if tokenising gives a different number of tokens from those generated, which is ``told``.
        """
        if answer.ids:
            return answer.ids
        ids = self._prompts.ids(answer.text)
        return ids if ids is not None and len(ids) == told else []

    def _dump(self, *_: Any) -> None:
        """Print the server's last lines on SIGUSR1, which the pytest process sends before it kills a hanging load."""
        faulthandler.dump_traceback(all_threads=False)
        if self._server is not None:
            sys.stderr.write(f"the server's last lines:\n{self._server.tail}\n")
        sys.stderr.flush()


def _error(message: str) -> Message:
    info = ErrorInfo(message=message, type_name="RuntimeError", phase="run")
    return {"kind": "error", "outcome": results.FAILED, "error": asdict(info)}
