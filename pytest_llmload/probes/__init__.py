"""One file for each thing that is measured. Import ``Metric`` and ``Probe`` from here to write your own."""

from pytest_llmload.core.metrics import Metric
from pytest_llmload.core.units import Tolerance
from pytest_llmload.probes.base import Probe

__all__ = ["Metric", "Probe", "Tolerance"]
