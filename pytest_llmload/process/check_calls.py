"""The checks of a load, each at its moment, and what their findings and exceptions mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import LoadResult, Problem
from pytest_llmload.process.missing_requirement import missing_requirement
from pytest_llmload.process.raised import fault, innermost, is_own
from pytest_llmload.strategies import Strategy
from pytest_llmload.worker.model.device import is_out_of_memory

if TYPE_CHECKING:
    from pytest_llmload.worker.model.loaded import Loaded

#: If one of these checks fails, the model is not run again.
_BROKEN = ("forward", "generate")


class CheckCalls:
    """The checks of one load, and of the strategies that it is loaded by; their problems are added to its result."""

    def __init__(self, job: Job, result: LoadResult, served_by: Sequence[Strategy]) -> None:
        self._job = job
        self._result = result
        self._served_by = served_by

    @property
    def is_broken(self) -> bool:
        """Return True once the model did not run, so that it is not run again."""
        return any(problem.check in _BROKEN for problem in self._result.problems)

    def found(self, check: str) -> bool:
        """Return True if a check has found a problem."""
        return any(problem.check == check for problem in self._result.problems)

    def after_load(self, loaded: Loaded) -> None:
        """Check what was loaded, before any forward."""
        from pytest_llmload.worker.checks import AFTER_LOAD, check_name

        for check in AFTER_LOAD:
            self._add(check_name(check), partial(check, loaded))
        for strategy in self._served_by:
            self._add(strategy.name, partial(strategy.applied, self._job, loaded))

    def after_forward(self, loaded: Loaded) -> None:
        """Check what the first forward left, while its logits are there."""
        from pytest_llmload.worker.checks import AFTER_FORWARD, check_name

        for check in AFTER_FORWARD:
            self._add(check_name(check), partial(check, loaded))

    def after_figures(self, loaded: Loaded) -> None:
        """Check what needs every weight, or a further run of the model, unless the model does not run."""
        from pytest_llmload.worker.checks import AFTER_FIGURES, check_name

        if self.is_broken:
            return
        for check in AFTER_FIGURES:
            self._add(check_name(check), partial(check, loaded))
            loaded.forget()
        for strategy in self._served_by:
            self._rerun(strategy, loaded)
            loaded.forget()

    def same_output(self, loaded: Loaded) -> None:
        """Compare the model's output with that of the model loaded whole."""
        from pytest_llmload.worker.parallel import reference

        self._add("same output", partial(reference.check, loaded))

    def attempt(self, check: str, loaded: Loaded, call: Callable[[], Any]) -> Any:
        """Return the call's result; None if it raised, which is a problem of the load.

        What is the machine's propagates: out of memory, and a kernel of transformers whose package is not installed,
        which FP8 asks for in the first forward.
        """
        try:
            return call()
        except Exception as error:
            # Any other exception of foreign code is the finding itself.
            if is_out_of_memory(error) or missing_requirement(error):
                raise
            self._result.problems.append(self._does_not_run(check, loaded, error))
            return None

    def _add(self, name: str, check: Callable[[], Iterable[Problem]]) -> None:
        """Add a check's problems to the result; if the check raises, record a fault of this package instead."""
        try:
            for problem in check():
                self._result.problems.append(problem)
        except Exception as error:  # noqa: BLE001 - a check may raise anything; the other checks and probes continue
            self._result.faults.append(fault(f"check {name!r} of pytest-llmload", error))

    def _rerun(self, strategy: Strategy, loaded: Loaded) -> None:
        """Add the problems of a check that runs the model again; tell exceptions of the check from the model's."""
        try:
            for problem in strategy.exercised(self._job, loaded):
                self._result.problems.append(problem)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if is_own(error):
                self._result.faults.append(fault(f"check {strategy.name!r} of pytest-llmload", error))
            else:
                self._result.problems.append(self._does_not_run("forward", loaded, error))

    def _does_not_run(self, check: str, loaded: Loaded, error: Exception) -> Problem:
        """Return the problem of a model whose own code raised."""
        from pytest_llmload.worker.checks import offloaded
        from pytest_llmload.worker.checks.quantised import library_hint

        text = f"the model does not run: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        place = innermost(error)
        causes = (strategy.why_not_run(self._job, loaded) for strategy in self._served_by)
        hint = library_hint(loaded, place) or offloaded.hint(loaded, error) or next(filter(None, causes), "")
        return Problem(check, f"{text} ({place})", hint=hint)
