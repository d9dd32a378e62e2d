"""One file per thing that is measured. ``from pytest_llmload.probes import Probe`` to write one of your own."""

from pytest_llmload.probes.base import Probe

__all__ = ["Probe"]
