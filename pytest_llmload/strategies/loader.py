"""The user's own loading code."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.core.references import resolve
from pytest_llmload.strategies.base import Strategy

if TYPE_CHECKING:
    from collections.abc import Callable


class Loader(Strategy):
    """Calls ``function(spec)``; the test's other markers state what must hold for the model that it returns.

    ``spec.model`` is the folder of the model's files on this machine, also if ``--llm-model`` is a Hub name, and
    ``spec.adapter`` is the folder of the adapter's files.
    """

    name = "loader"
    summary = "Production's own function: function(spec) -> model or (model, tokenizer)."
    fields: ClassVar[dict[str, Any]] = {"strategy": "loader"}
    own_code = True
    options: ClassVar[tuple[str, ...]] = ("target",)
    packages = ("torch",)

    def load(self, job: Job, kwargs: dict[str, Any]) -> Any:
        if not job.spec.target:
            raise ValueError("the loader strategy needs a target: strategy('loader', target='package.module:function')")
        target: Callable[[Any], Any] = resolve(job.spec.target)
        adapter = job.adapter.path if job.adapter is not None else None
        return target(dataclasses.replace(job.spec, model=job.checkpoint.path, adapter=adapter))
