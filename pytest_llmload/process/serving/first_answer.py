"""The first request to an endpoint, which shows whether it serves the right model and accepts the key."""

from __future__ import annotations

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import LoadResult
from pytest_llmload.process.serving import endpoint_checks, finding
from pytest_llmload.process.serving.answers import About, Answer
from pytest_llmload.process.serving.http import Endpoint
from pytest_llmload.process.serving.servers.base import ServerKind
from pytest_llmload.process.serving.servers.openai import RequestRefused


def first_answer(
    job: Job, result: LoadResult, endpoint: Endpoint, kind: ServerKind, about: About, prompt: str, key: str
) -> Answer | None:
    """Return the answer to a prompt, of one token; None, with a problem in the result, if it serves a different model.

    Raises MachineError if the key is refused or the address has no API under it.
    """
    kind.model, is_listed = endpoint_checks.choose(job, about)
    if not is_listed and about.models is not None and kind.lists_what_it_serves:
        result.problems.append(endpoint_checks.not_served(job, about, kind.model))
        return None
    try:
        answer = kind.answer(prompt, 1)
    except RequestRefused as refused:
        if refused.for_its_key:
            raise finding.refused_key(refused.status, key) from None
        if job.endpoint and refused.status == 404 and kind.says.get("/v1/models").status == 404:
            raise finding.wrong_path(endpoint, 404) from None
        if not is_listed and refused.status in (400, 404):
            problem = endpoint_checks.not_served(job, about, kind.model, str(refused))
            result.problems.append(problem)
            return None
        raise
    if job.checks and kind.answers_to(endpoint_checks.NO_MODEL):
        if not is_listed and about.models:
            why = "it answers to any id"
            result.problems.append(endpoint_checks.not_served(job, about, kind.model, why))
            return None
        note = "the endpoint answers to any model id, so that its answer to the right one proves nothing"
        result.notes.append(note)
    return answer
