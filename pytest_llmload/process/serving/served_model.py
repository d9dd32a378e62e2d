"""A load that is a server's: it is started or found, asked, checked and measured, from outside."""

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
from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.job import Job
from pytest_llmload.core.results import NOT_APPLIED, ErrorInfo, LoadResult, Problem
from pytest_llmload.probes.own import declared_by, own_probes
from pytest_llmload.process.serving import endpoint_checks, launch, memory, request_rounds, tgi
from pytest_llmload.process.serving.api import About, Answer, Api, BadAnswer
from pytest_llmload.process.serving.http import Endpoint, HungUp, Late, Unreachable
from pytest_llmload.process.serving.openai import OpenAI
from pytest_llmload.process.serving.prompts import Prompts
from pytest_llmload.process.serving.server_process import HOST, Server, free_port
from pytest_llmload.quantisation.registry import schemes
from pytest_llmload.strategies.served import Served as Declaration
from pytest_llmload.system.process_exit import Died
from pytest_llmload.system.protocol import Message

#: The key of a running endpoint; no other variable is read: a token for one service is no other's business.
KEY = "LLM_ENDPOINT_KEY"
#: Part of ``--llm-timeout`` after which the load ends itself, and can say what it waited for.
_PART = 0.9
#: Seconds for a server to end after it hung up in the middle of an answer.
_ENDING = 3.0
#: Seconds between two looks at a running endpoint, and for one answer to them.
_LOOK, _PATIENCE = 0.2, 5.0
_INSIDE = "the model is in a server: what is inside its processes cannot be seen"
_FOREIGN = "the endpoint was not started here: when it loaded, and on what, cannot be seen"


class Served:
    """The client of one endpoint, and the owner of its server where the load starts one."""

    def __init__(self, job: Job, tell: Callable[[str], None], log: Path) -> None:
        self._job = job
        self._tell = tell
        self._log = log
        self._foreign = bool(job.endpoint)
        self._server: Server | None = None
        self._phase = "start"
        self._tokenizer: Any = None
        self._api: Api | None = None
        digests = {"shape": job.checkpoint.shape, "weights": job.checkpoint.weights}
        self._result = LoadResult(spec=job.spec.to_json(), outcome=results.LOADED, digests=digests)
        # Before the server is there: it may be what hangs.
        faulthandler.unregister(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, self._dump)

    # --- the messages of a load's process ------------------------------------------------------------------------

    def load(self) -> LoadResult:
        """Start, check and measure. Raises Died, and MachineError where a running endpoint cannot be reached."""
        deadline = time.monotonic() + _PART * self._job.timeout
        result = self._result
        with self._answered():
            api = self._begin(deadline)
            if api is not None and self._job.measure and self._job.generates:
                self._measure(api)
        result.environment |= self._environment()
        result.notes = list(dict.fromkeys([*result.notes, *(self._api.notes if self._api is not None else ())]))
        why = _FOREIGN if self._foreign else _INSIDE
        result.declared = declared_by(own_probes(self._job))
        missing = [name for name in result.table if name not in result.metrics and name not in result.unavailable]
        result.unavailable |= dict.fromkeys((*missing, "manifest", "numbers"), why)
        if result.problems:
            result.outcome = NOT_APPLIED
        return result

    def ask(self, message: Message) -> Message:
        """``generate`` goes through the endpoint; what needs the model itself is a RuntimeError. Raises Died."""
        if message["kind"] != "generate":
            return {**_error(Declaration.no_model), "changed": False}
        self._enter("generate")
        self._endpoint.deadline = time.monotonic() + _PART * self._job.timeout
        before = len(self._result.problems)
        with self._answered():
            assert self._api is not None
            answer = self._api.answer(message["text"], message["max_new_tokens"])
            return {"kind": "value", "tokens": self._ids(answer), "text": answer.text}
        return _error(self._result.problems[before].message)

    def close(self) -> None:
        """Stop the server; an endpoint that ran before goes on."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    # --- beginning -----------------------------------------------------------------------------------------------

    def _begin(self, deadline: float) -> Api | None:
        """An endpoint that is healthy and has answered once; None where it says that it serves another model."""
        job = self._job
        with self._timed("tokenizer"):
            self._load_tokenizer()
        if self._foreign:
            self._endpoint = Endpoint(job.endpoint, os.environ.get(KEY, ""))
        else:
            self._set_page_cache()
            port = free_port()
            self._endpoint = Endpoint(f"http://{HOST}:{port}")
        self._endpoint.deadline = deadline
        begin = perf_counter()
        with self._timed("start"):
            if not self._foreign:
                self._server = Server(launch.command(job, port), launch.log_of(self._log))
            self._wait(deadline)
        with self._timed("load"):
            self._api = api = self._found()
            about = api.about()
            self._about(about)
            api.model, problems = endpoint_checks.choose(job, about)
            self._result.problems += problems
            if problems:
                return None
            self._prompts = Prompts(job.spec.workload.prompt_tokens, self._tokenizer, salted=self._foreign)
            # A server may load only now: until it has answered, it is not ready.
            answer = api.answer(self._prompts.next(), 1)
        if not self._foreign and job.measure:
            self._result.metrics["load"] = perf_counter() - begin
            self._result.samples["load"] = [self._result.metrics["load"]]
        self._result.problems += endpoint_checks.answered_by(job, answer, api.model)
        return api

    def _wait(self, deadline: float) -> None:
        if self._server is not None:
            self._server.wait_until(self._complaint, deadline, self._endpoint.is_open)
            return
        while complaint := self._complaint():
            if time.monotonic() > deadline:
                message = f"the endpoint was not healthy within {_PART:.0%} of --llm-timeout: {complaint}"
                raise Died(ErrorInfo(message=message, phase="start"), outcome=results.TIMEOUT)
            # Nobody tells when somebody else's server is ready.
            time.sleep(_LOOK)

    def _complaint(self) -> str:
        """Why the endpoint is not healthy; empty where it is. MachineError where a running one is not there."""
        try:
            reply = self._endpoint.get("/health", _PATIENCE)
            if reply.status in (404, 405):
                # Not every server has it; all that speak OpenAI's API list their models.
                reply = self._endpoint.get("/v1/models", _PATIENCE)
        except Unreachable as error:
            if self._foreign:
                raise MachineError(f"the endpoint cannot be reached: {error} (--llm-endpoint)") from None
            return str(error)
        except (HungUp, Late) as error:
            return str(error)
        if reply.status in (401, 403) and self._foreign:
            raise MachineError(f"the endpoint answers {reply.status}: its key is read from {KEY}")
        return "" if reply.status == 200 else f"/health answers {reply.status}: {reply.quoted}"

    def _found(self) -> Api:
        """The protocol, by what was asked for or by what the endpoint answers."""
        kind = self._job.spec.option("api")
        ours = not self._foreign and self._job.spec.option("command") is None
        if kind is None:
            kind = "tgi" if not ours and tgi.speaks(self._endpoint) else "openai"
        return tgi.Tgi(self._endpoint) if kind == "tgi" else OpenAI(self._endpoint, transformers=ours)

    def _about(self, about: About) -> None:
        if about.server:
            self._result.environment["server"] = about.server
        if about.revision:
            self._result.environment["revision"] = about.revision
        if about.cache_tokens is not None:
            self._result.metrics["kv_cache.tokens"] = about.cache_tokens
        else:
            self._result.unavailable["kv_cache.tokens"] = "the server does not report the capacity of a cache"

    # --- measuring -----------------------------------------------------------------------------------------------

    def _measure(self, api: Api) -> None:
        job, result = self._job, self._result
        workload = job.spec.workload
        if self._server is not None and job.checks:
            result.metrics["server.settled"] = memory.settled(self._server.pid)
        self._enter("applied")
        prompt = self._prompts.next()
        answer = api.answer(prompt, workload.new_tokens)
        if job.checks:
            result.problems += endpoint_checks.counted(api, self._prompts, prompt, answer)
            result.notes += filter(None, [endpoint_checks.names_nobody(api)])
            self._short(answer)
        with self._timed("generate"):
            request_rounds.run(api, self._prompts, workload.new_tokens, workload.batch).fill(result)
        if self._server is not None and job.checks:
            self._server.check("while it was measured")
            self._memory(self._server)
            if isinstance(api, OpenAI) and api.as_told and self._tokenizer is not None:
                self._compare(prompt, answer)

    def _compare(self, prompt: str, answer: Answer) -> None:
        """After all figures: the reference takes memory of its own."""
        from pytest_llmload.process.serving import reference

        with self._timed("reference"):
            problems, note = reference.check(self._job, self._tokenizer, prompt, answer.text)
        self._result.problems += problems
        self._result.notes += filter(None, [note])

    def _short(self, answer: Answer) -> None:
        """Notes on what was measured where it is not the workload."""
        workload = self._job.spec.workload
        if answer.tokens is not None and answer.tokens < workload.new_tokens:
            self._result.notes.append(f"the endpoint stopped after {answer.tokens} of {workload.new_tokens} tokens")
        if answer.prompt_tokens is not None and answer.prompt_tokens != workload.prompt_tokens:
            self._result.notes.append(
                f"the prompt is {answer.prompt_tokens} tokens by the endpoint, the workload's is "
                f"{workload.prompt_tokens}: {'no tokenizer is at hand' if self._tokenizer is None else 'a template'}"
            )

    def _memory(self, server: Server) -> None:
        job, result = self._job, self._result
        result.metrics["server.peak"] = memory.peak(server.pid)
        result.phase_peaks["generate"] = {"host": result.metrics["server.peak"]}
        held: float | None = result.metrics["server.settled"]
        if job.device.kind == "cuda":
            gpus, why = memory.on_gpus(server.pid, job.device)
            held = sum(gpus.values()) if gpus else None
            if "kv_cache.tokens" in result.metrics:
                why = why or "the server fills the GPU with its cache on purpose: kv_cache.tokens is what it holds"
            elif job.spec.option("continuous_batching"):
                why = why or "with continuous batching the server fills the GPU with its cache, whose size it hides"
            if why:
                result.unavailable["gpu.process"] = why
            else:
                result.metrics |= {f"gpu.{gpu}.process": size for gpu, size in gpus.items()}
                result.metrics["gpu.process"] = sum(gpus.values())
            result.phase_peaks["generate"] |= {f"gpu.{gpu}": size for gpu, size in gpus.items()}
        if job.spec.quant != "none":
            problems, note = endpoint_checks.quantised(job, server.pid, held)
            result.problems += problems
            result.notes += filter(None, [note])
            served = schemes()[job.spec.quant][0].served
            if served is not None and any(getattr(job.spec, name) != value for name, value in served.fields.items()):
                result.notes.append(served.note)

    # --- what else -----------------------------------------------------------------------------------------------

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """What is wrong with an answer becomes a problem of the load; what ended the server, its death."""
        try:
            yield
        except BadAnswer as error:
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

    def _environment(self) -> dict[str, str]:
        if self._foreign:
            # Of this machine nothing matters; times of one endpoint are compared with its own.
            return {"host": "endpoint"}
        from pytest_llmload.process.environment import environment

        return environment(self._job)

    def _load_tokenizer(self) -> None:
        """The model's tokenizer, from files that are here."""
        from transformers import AutoTokenizer

        job = self._job
        source = job.checkpoint.path or job.spec.model.partition("@")[0]
        if job.spec.model.startswith("random:") and not job.checkpoint.path:
            return
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                source, local_files_only=True, trust_remote_code=job.trust_remote_code
            )
        except Exception as error:  # noqa: BLE001 - without one, prompts are words, and a note says so
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            self._result.notes.append(f"no tokenizer of the model is on this machine, so prompts are words ({why})")

    def _ids(self, answer: Answer) -> list[int]:
        """Token ids of an answer: as the protocol tells them, else by the tokenizer where it makes as many of the text
        as the endpoint counted; -1 for each where nobody knows."""
        if answer.ids:
            return answer.ids
        ids = []
        if self._tokenizer is not None:
            ids = self._tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        count = answer.tokens if answer.tokens is not None else len(ids)
        return list(ids) if len(ids) == count else [-1] * count

    def _dump(self, *_: Any) -> None:
        """On the pytest process's SIGUSR1, before it kills a load that hangs: what the server said last."""
        faulthandler.dump_traceback(all_threads=False)
        if self._server is not None:
            sys.stderr.write(f"the server's last lines:\n{self._server.tail}\n")
        sys.stderr.flush()


def _error(message: str) -> Message:
    info = ErrorInfo(message=message, type_name="RuntimeError", phase="run")
    return {"kind": "error", "outcome": results.FAILED, "error": asdict(info)}
