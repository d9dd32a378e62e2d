"""One file per thing that is measured. ``from pytest_llmload.probes import Metric, Probe`` to write one of your own."""

from pytest_llmload.core.metrics import Metric
from pytest_llmload.core.units import Tolerance
from pytest_llmload.probes.base import Probe

__all__ = ["Metric", "Probe", "Tolerance"]
