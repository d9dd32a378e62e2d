"""Strategies as pytest sees them, and how those of one spec are put together. No torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any, ClassVar

import pytest

from pytest_llmload.core.job import Checkpoint, Device, Gpu, Job
from pytest_llmload.core.libraries import is_installed
from pytest_llmload.core.references import resolve
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.host.loads.preloaded_modules import own_modules
from pytest_llmload.process import job_strategies
from pytest_llmload.strategies import Strategy
from pytest_llmload.strategies.builtin import BUILTIN

FIELDS = {item.name for item in dataclasses.fields(LoadSpec)}


def job(**fields: Any) -> Job:
    return Job(LoadSpec(model="x", name="x", **fields), Device("cpu", "cpu-x86_64"), Checkpoint("/x", "s", "w"))


def test_reading_every_declaration_imports_no_torch() -> None:
    program = (
        "import sys\n"
        "from pytest_llmload.strategies.builtin import BUILTIN\n"
        "for strategy in BUILTIN.values(): strategy.fields\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'bitsandbytes', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", BUILTIN)
def test_a_declaration_is_complete(name: str) -> None:
    strategy = BUILTIN[name]
    assert issubclass(strategy, Strategy)
    assert strategy.name == name
    assert strategy.summary.endswith(".")
    assert strategy.fields
    assert set(strategy.fields) <= FIELDS
    # An adapter is a facet of its own, not a value of one.
    assert name in strategy.fields.values() or strategy.fields["adapter"] == ""
    assert "torch" in strategy.packages


@pytest.mark.parametrize("reference", ["json", "json:", ":dumps", ""])
def test_what_is_no_import_string_is_said(reference: str) -> None:
    with pytest.raises(ValueError, match="is not an import string"):
        resolve(reference)


def test_an_import_string_names_an_object_in_a_module() -> None:
    assert resolve("json:dumps") is json.dumps
    assert resolve("json:JSONDecoder.decode") is json.JSONDecoder.decode


def test_a_spec_is_served_by_the_strategies_of_its_facets() -> None:
    names = [strategy.name for strategy in job_strategies.strategies(job(strategy="auto", dtype="bf16", quant="nf4"))]
    assert names == ["auto", "bf16", "nf4"]
    assert [strategy.name for strategy in job_strategies.strategies(job())] == ["single"]


def test_an_unknown_strategy_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown strategy 'maqic'; use one of auto, balanced"):
        job_strategies.strategies(job(strategy="maqic"))


class Other(Strategy):
    name = "other"
    summary = "For the test."
    fields: ClassVar[dict[str, Any]] = {"strategy": "other"}
    options = ("mine",)

    def load_kwargs(self, job: Job) -> dict[str, Any]:
        return {"device_map": "auto", "mine_is": job.spec.option("mine")}


def test_registered_strategies_options_and_arguments_of_the_library() -> None:
    options = (("keys_ok", '["a.*"]'), ("low_cpu_mem_usage", "true"), ("mine", "7"))
    asked = dataclasses.replace(
        job(strategy="other", options=options, attn="eager"), strategies={"other": f"{__name__}:Other"}
    )
    kwargs = job_strategies.load_kwargs(asked, job_strategies.strategies(asked))
    assert kwargs == {
        "device_map": "auto",
        "mine_is": 7,
        "low_cpu_mem_usage": True,
        "attn_implementation": "eager",
        "dtype": "auto",
    }


def test_contradictions_name_both_sides() -> None:
    asked = job(options=(("device_map", '"auto"'),))
    with pytest.raises(ValueError, match=r"device_map='auto' by the test's own options .* by strategy 'single'; "):
        job_strategies.load_kwargs(asked, job_strategies.strategies(asked))


@pytest.mark.parametrize("name", ["tensor_parallel", "tp_plan", "deepspeed"])
def test_what_is_split_is_the_suites_where_enough_gpus_are_visible(name: str) -> None:
    strategy = BUILTIN[name]
    gpus = tuple(Gpu(f"GPU-{index}", "H100", 80 << 30, (9, 0), index) for index in range(2))
    assert strategy.why_not_by_default(Device("cuda", "h100", gpus)) == ""
    assert strategy.why_not_by_default(Device("cuda", "h100", gpus[:1])) == "needs 2 GPUs, this run sees 1"
    assert f"--llm-strategy={name}" in strategy.why_not_by_default(Device("cpu", "cpu-x86_64"))
    assert Strategy.why_not_by_default(Device("cpu", "cpu-x86_64")) == ""


def test_what_would_touch_the_gpu_is_not_imported_by_the_server() -> None:
    strategy = BUILTIN["deepspeed"]
    spec = LoadSpec(model="x", name="x", **strategy.fields)

    class Declared:
        def of(self, spec: LoadSpec) -> list[Any]:
            return [strategy]

    modules = own_modules([spec], [], Declared())  # type: ignore[arg-type]
    assert "deepspeed" not in modules
    assert "deepspeed" in strategy.packages
    assert strategy.__module__ in modules


def test_a_package_whose_parent_is_missing_is_not_installed() -> None:
    """``optimum.quanto`` where no optimum is installed: find_spec raises for it."""
    assert not is_installed("no_such_package.part")
    assert is_installed("json.decoder")
