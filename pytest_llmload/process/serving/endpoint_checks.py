"""Whether an endpoint serves what was asked for, as far as it can be told from outside."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import PurePath

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import Problem
from pytest_llmload.core.spec import SINGLE
from pytest_llmload.core.units import format_bytes
from pytest_llmload.process.serving import memory
from pytest_llmload.process.serving.api import About, Answer, Api
from pytest_llmload.process.serving.prompts import Prompts
from pytest_llmload.quantisation.registry import method_of

#: A model that nobody serves.
_NO_MODEL = "pytest-llmload/no-such-model"
#: Bytes that a server's processes hold beside weights at most: libraries, CUDA's context, caches.
_BESIDE = 2 << 30


def expected_ids(job: Job) -> tuple[str, ...]:
    """Names under which an endpoint may serve the job's model."""
    own = job.spec.option("model_id")
    if own is not None:
        return (str(own),)
    source = job.spec.model.removeprefix("random:")
    # A server that is started here was given the folder.
    first = () if job.endpoint else (job.checkpoint.path,)
    names = (*first, source, job.spec.name, PurePath(source).name, PurePath(job.checkpoint.path).name)
    return tuple(dict.fromkeys(_bare(name) for name in names if name))


def _bare(name: str) -> str:
    """A model's name without a revision, which transformers' server adds."""
    return name.partition("@")[0]


def choose(job: Job, about: About) -> tuple[str, list[Problem]]:
    """The id to ask for, and what is wrong where the endpoint says that it serves other models only."""
    wanted = expected_ids(job)
    if about.models is None:
        return wanted[0], []
    found = next((model for model in about.models if _bare(model) in wanted), None)
    if found is not None:
        return found, []
    served = ", ".join(repr(_shown(job, model)) for model in about.models) or "no model"
    return wanted[0], [Problem("model", f"the endpoint serves {served}, not {_shown(job, wanted[0])!r}", hint=_HINT)]


_HINT = "strategy('served', model_id='…') where it serves the model under another name"


def _shown(job: Job, name: str) -> str:
    """Where files lie is this machine's business."""
    return name.replace(job.checkpoint.path, job.spec.name) if job.checkpoint.path else name


def answered_by(job: Job, answer: Answer, asked: str) -> Iterator[Problem]:
    """The answer names the model that was asked for."""
    if answer.model and _bare(answer.model) not in (_bare(asked), *expected_ids(job)):
        text = f"asked for {_shown(job, asked)!r}, the answer is by {_shown(job, answer.model)!r}"
        yield Problem("model", text, hint=_HINT)


def counted(api: Api, prompts: Prompts, prompt: str, answer: Answer) -> Iterator[Problem]:
    """The endpoint counts a prompt's tokens as the checkpoint's tokenizer does."""
    own = prompts.count(prompt)
    if own is None or answer.prompt_tokens is None or getattr(api, "chat", False):
        return
    if own != answer.prompt_tokens:
        yield Problem(
            "tokenizer",
            f"a prompt of {own} tokens by the checkpoint's tokenizer has {answer.prompt_tokens} by the endpoint's: "
            "it has another tokenizer",
        )


def names_nobody(api: Api) -> str:
    """A note where the endpoint answers under any name, so that its id proves nothing."""
    if api.answers_to(_NO_MODEL):
        return "the endpoint answers to any model id: that it answers to the right one proves nothing"
    return ""


def quantised(job: Job, root: int, held: float | None) -> tuple[list[Problem], str]:
    """Whether a started server quantised anything: by what it has mapped, and by what it holds.

    ``held`` are the bytes of its processes where the weights are, None where nobody knows. Problems, and a note on what
    could not be told: a server does not say how it loaded, and its processes hold more than weights.
    """
    from pytest_llmload.worker.planning.planner import plan

    asked = job.spec.quant
    method = method_of(asked)
    if not memory.has_mapped(root, method.library):
        text = f"{asked} was asked for, and no process of the server has the library of {method.name}"
        return [Problem("quantised", f"{text}: nothing was quantised")], ""
    if held is None:
        return [], f"the server has {method.name} loaded; what is quantised cannot be told, for want of its GPU memory"
    single = dataclasses.replace(job.spec, strategy=SINGLE, options=())
    dense = dataclasses.replace(single, quant="none", double_quant=False)
    small, large = (plan(dataclasses.replace(job, spec=spec))["weights.logical"] for spec in (single, dense))
    figures = f"{format_bytes(held)} held, {format_bytes(small)} of weights in {asked}, {format_bytes(large)} dense"
    if held < large:
        return [], ""
    if held > small + _BESIDE and large > small + _BESIDE:
        return [Problem("quantised", f"the server's memory is that of the dense model: {figures}", bytes=int(held))], ""
    return [], (
        f"the server has {method.name} loaded, but the model is too small to tell by its memory what is quantised "
        f"({figures})"
    )
