"""The probes that hooks register for a run, and the table of metrics that they make it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_llmload.core.metrics import table_with
from pytest_llmload.core.references import resolve
from pytest_llmload.probes import Probe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_llmload.core.job import Scope
    from pytest_llmload.core.metrics import Metric


class OwnProbes:
    """The user's probes of a run. Raises UsageError for one that cannot be imported or declares what cannot be."""

    def __init__(self, config: pytest.Config) -> None:
        references = [each for listed in config.hook.pytest_llmload_probes(config=config) for each in listed]
        #: ``module:Class`` -> class, in the order they run.
        self._classes: dict[str, type[Probe]] = {reference: _imported(reference) for reference in references}
        try:
            #: Every metric of the run by name: ours, then those of these probes.
            self.table: Mapping[str, Metric] = table_with(
                metric for probe in self._classes.values() for metric in probe.metrics
            )
        except ValueError as error:
            raise pytest.UsageError(f"pytest_llmload_probes: {error}") from None

    def of(self, scope: Scope) -> tuple[str, ...]:
        """Return the ``module:Class`` of each probe that runs in a load of this scope."""
        return tuple(
            reference
            for reference, probe in self._classes.items()
            if scope.own_probes is None or any(metric.section in scope.own_probes for metric in probe.metrics)
        )


def _imported(reference: str) -> type[Probe]:
    try:
        found = resolve(reference)
    except (ValueError, ImportError, AttributeError) as error:
        # A metric that cannot be is a ValueError of the module's own body.
        raise pytest.UsageError(f"pytest_llmload_probes: {reference!r} cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Probe)):
        raise pytest.UsageError(
            f"pytest_llmload_probes: {reference!r} is not a subclass of pytest_llmload.probes.Probe"
        )
    return found
