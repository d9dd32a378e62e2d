"""Check that an endpoint serves the requested model, as far as that shows from outside."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import PurePath

from pytest_llmload.core.endpoint_address import EndpointAddress
from pytest_llmload.core.job import Job
from pytest_llmload.core.results import Problem
from pytest_llmload.core.spec import AS_STORED, SINGLE
from pytest_llmload.core.units import format_bytes, plural
from pytest_llmload.process.serving import memory
from pytest_llmload.process.serving.answers import About, Answer
from pytest_llmload.process.serving.prompts import Prompts
from pytest_llmload.process.serving.servers.base import ServerKind
from pytest_llmload.quantisation.registry import method_of

#: A model id that is unknown to every server.
NO_MODEL = "pytest-llmload/no-such-model"
#: The most bytes that a server's processes hold besides weights: libraries, CUDA's context, caches.
_BESIDE = 2 << 30


def expected_ids(job: Job) -> tuple[str, ...]:
    """Return the names under which an endpoint may serve the job's model, the likeliest first."""
    given = EndpointAddress.parse(job.endpoint).model_id if job.endpoint else ""
    own = job.spec.option("model_id") or given
    if own:
        return (str(own),)
    source = job.spec.model.removeprefix("random:")
    # A server that the load started was given the folder.
    first = () if job.endpoint else (job.checkpoint.path,)
    names = (*first, source, job.spec.name, PurePath(source).name, PurePath(job.checkpoint.path).name)
    return tuple(dict.fromkeys(_bare(name) for name in names if name))


def _bare(name: str) -> str:
    """Return a model's name without a revision, which transformers' server adds."""
    return name.partition("@")[0]


def choose(job: Job, about: About) -> tuple[str, bool]:
    """Return the model id to request, and whether the endpoint lists it."""
    wanted = expected_ids(job)
    for model in about.models or ():
        # llama.cpp's servers list the path of a file if they were not given an alias.
        if _bare(model) in wanted or PurePath(model).name.removesuffix(".gguf") in wanted:
            return model, True
    return wanted[0], False


def not_served(job: Job, about: About, asked: str, why: str = "") -> Problem:
    """Return the problem of an endpoint that serves other models; ``why`` is the evidence if it has no list."""
    served = ", ".join(repr(_shown(job, model)) for model in about.models or ()) or "no model"
    lists = f"the endpoint serves {served}" if about.models is not None else "the endpoint does not serve it"
    text = f"{lists}, not {_shown(job, asked)!r}" if about.models is not None else f"{_shown(job, asked)!r}: {lists}"
    return Problem("model", f"{text} ({_shown(job, why)})" if why else text, hint=HINT)


HINT = (
    "if it serves the model under a different name, write it before the address, --llm-endpoint=ID=URL, or in "
    "strategy('served', model_id='…')"
)


def _shown(job: Job, name: str) -> str:
    """Return a name, or the model's if the name is a folder of this machine."""
    return name.replace(job.checkpoint.path, job.spec.name) if job.checkpoint.path else name


def answered_by(job: Job, answer: Answer, asked: str) -> Iterator[Problem]:
    """Yield a problem if the answer names a different model from the requested one."""
    if answer.model and _bare(answer.model) not in (_bare(asked), *expected_ids(job)):
        text = f"{_shown(job, asked)!r} was requested, but the answer is by {_shown(job, answer.model)!r}"
        yield Problem("model", text, hint=HINT)


def counted(kind: ServerKind, prompts: Prompts, prompt: str, answer: Answer) -> Iterator[Problem]:
    """Yield a problem if the endpoint and the checkpoint's tokenizer count a prompt's tokens differently."""
    own = prompts.count(prompt)
    if own is None or answer.prompt_tokens is None or kind.chat:
        return
    if own != answer.prompt_tokens:
        yield Problem(
            "tokenizer",
            f"a prompt of {own} {plural(own, 'token')} by the checkpoint's tokenizer has {answer.prompt_tokens} by the "
            "endpoint's: it has a different tokenizer",
        )


def quantised(job: Job, root: int, held: float | None) -> tuple[list[Problem], str]:
    """Check that a started server quantised the model, by the libraries that it has mapped and the memory it holds.

    ``held`` are the bytes of its processes where the weights are, None if unknown. Return the problems, and a note on
    what could not be checked: a server does not report how it loaded, and its processes hold more than weights.
    """
    from pytest_llmload.process.job_strategies import plan

    asked = job.spec.quant
    method = method_of(asked)
    if not memory.has_mapped(root, method.library):
        text = f"{asked} was requested, but no process of the server has loaded {method.name}"
        return [Problem("quantised", f"{text}: nothing was quantised")], ""
    if held is None:
        return [], f"the server has {method.name} loaded; how much is quantised is unknown without its GPU memory"
    single = dataclasses.replace(job.spec, strategy=SINGLE, options=())
    dense = dataclasses.replace(single, quant=AS_STORED, double_quant=False)
    small, large = (plan(dataclasses.replace(job, spec=spec))["weights.logical"] for spec in (single, dense))
    figures = f"{format_bytes(held)} held, {format_bytes(small)} of weights in {asked}, {format_bytes(large)} dense"
    if held < large:
        return [], ""
    if held > small + _BESIDE and large > small + _BESIDE:
        return [Problem("quantised", f"the server's memory is that of the dense model: {figures}", bytes=int(held))], ""
    return [], (
        f"the server has {method.name} loaded, but the model is too small for its memory to show what is quantised "
        f"({figures})"
    )
