"""Hooks for plugins and conftests of users."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_llmload.core.job import Device
    from pytest_llmload.core.results import LoadResult


@pytest.hookspec
def pytest_llmload_strategies(config: pytest.Config) -> dict[str, str]:  # type: ignore[empty-body]
    """Register strategies: name -> ``"module:Class"``, a subclass of ``pytest_llmload.strategies.Strategy``.

    The module is imported at collection too: it must not import torch at its top level. ::

        def pytest_llmload_strategies(config):
            return {"awq": "ourapp.strategies:Awq"}
    """


@pytest.hookspec
def pytest_llmload_quantisation(config: pytest.Config) -> list[str]:  # type: ignore[empty-body]
    """Register quantisation methods: ``"module:Class"``, subclasses of ``pytest_llmload.quantisation.Method``.

    Each scheme that a method declares is a name in ``quant(...)``. The module is imported at collection too: it must
    not import torch at its top level. ::

        def pytest_llmload_quantisation(config):
            return ["ourapp.quantisation:Ternary"]
    """


@pytest.hookspec
def pytest_llmload_probes(config: pytest.Config) -> list[str]:  # type: ignore[empty-body]
    """Register probes: ``"module:Class"``, subclasses of ``pytest_llmload.probes.Probe``, in the order they run. ::

    def pytest_llmload_probes(config):
        return ["ourapp.probes:Power"]
    """


@pytest.hookspec(firstresult=True)
def pytest_llmload_device_key(config: pytest.Config, device: Device) -> str | None:
    """Rename a device's folder of baselines; several names may share one. None keeps ``device.key``. ::

    def pytest_llmload_device_key(config, device):
        return "h100" if "h100" in device.key else None
    """


@pytest.hookspec
def pytest_llmload_load_finished(config: pytest.Config, result: LoadResult) -> None:
    """Receive the result of each measured load, once per load, however it ended."""
