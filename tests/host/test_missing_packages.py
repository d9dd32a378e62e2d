"""A checkpoint whose format needs a package or a device that is not here: its tests are skipped with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pytest_llmload.process.missing_requirement import missing_requirement
from pytest_llmload.worker.checkpoints.resolve import resolve

Run = Callable[..., pytest.RunResult]
#: A ``quant_method`` whose package is not installed here -> its further settings, and the sentence of transformers 5.
ABSENT: dict[str, tuple[dict[str, Any], str]] = {
    "awq": ({"bits": 4, "group_size": 64}, "Loading an AWQ quantized model requires gptqmodel"),
    "gptq": ({"bits": 4, "group_size": 64}, "No module named 'optimum.gptq'"),
    # A method that this project does not know.
    "aqlm": ({}, "requires AQLM"),
    # A device.
    "spqr": ({}, "GPU is required to run SpQR quantized model"),
}
#: A model that loads; the first one is what ``llm_load`` loads.
OTHER = ("--llm-model=random:tiny-llama", "--llm-device=cpu", "--llm-workload=1x8+3")
TESTS = """
    import pytest

    def test_first(llm): pass
    def test_second(llm, memory_baseline): memory_baseline.check(llm)
    def test_own(llm_load): llm_load(shared=True)
"""


def quantised(directory: Path, cache: Path, method: str, settings: dict[str, Any]) -> str:
    shutil.copytree(resolve("random:tiny-llama", cache).path, directory)
    file = directory / "config.json"
    said = {"quantization_config": {"quant_method": method, **settings}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **said}))
    return f"--llm-model={directory}"


@pytest.mark.skipif(find_spec("transformers.core_model_loading") is None, reason="sentences of transformers 5")
@pytest.mark.parametrize("method", ABSENT)
def test_a_package_that_is_missing(
    method: str, pytester: pytest.Pytester, project: Run, checkpoint_cache: Path
) -> None:
    settings, sentence = ABSENT[method]
    model = quantised(pytester.path / "model", checkpoint_cache, method, settings)
    pytester.makepyfile(TESTS)
    result = project(model, *OTHER, "--llm-record-missing", "-rs", "--llm-report=run.json", fast=False)
    # The other model's tests run: a run that measures nothing at all is an error.
    result.assert_outcomes(passed=2, skipped=3)
    assert result.stdout.str().count(sentence) >= 1
    outcomes = {run["model"]: run["outcome"] for run in json.loads((pytester.path / "run.json").read_text())["runs"]}
    assert outcomes == {"model": "skip", "tiny-llama": "pass"}


def test_a_run_that_must_not_skip(pytester: pytest.Pytester, project: Run, checkpoint_cache: Path) -> None:
    model = quantised(pytester.path / "model", checkpoint_cache, "awq", ABSENT["awq"][0])
    pytester.makepyfile(TESTS)
    result = project(model, *OTHER, "--llm-record-missing", "--llm-require-hardware", fast=False)
    result.assert_outcomes(passed=2, errors=3)
    result.stdout.fnmatch_lines(
        ["*lacks a package for this checkpoint*, and --llm-require-hardware makes that an error"]
    )


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_an_attention_whose_package_is_missing(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.attn("flash_attention_2")
        def test_flash(llm): pass
        def test_own(llm): pass
        """
    )
    result = project(*OTHER, "-rs", fast=False)
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(
        ["*lacks a package or a device for this attention: FlashAttention2 has been toggled on*"]
    )


def raised(error: Exception, file: str, function: str = "validate_environment") -> Exception:
    """The error as code of a file raises it."""
    text = f"def {function}(error):\n    raise error\n"
    scope: dict[str, Any] = {}
    exec(compile(text, file, "exec"), scope)
    with pytest.raises(type(error)) as caught:
        scope[function](error)
    return caught.value


QUANTISER = "/site-packages/transformers/quantizers/quantizer_awq.py"
MODEL = "/site-packages/transformers/modeling_utils.py"


@pytest.mark.parametrize(
    ("error", "file", "is_missing"),
    [
        (ImportError("requires gptqmodel>=1.4.3"), QUANTISER, True),
        (ModuleNotFoundError("No module named 'absent'", name="absent"), QUANTISER, True),
        (ModuleNotFoundError("No module named 'absent.part'", name="absent.part"), QUANTISER, True),
        (RuntimeError("No GPU found"), QUANTISER, True),
        # Installed, and broken or of a release that does not fit: a failure.
        (ImportError("cannot import name 'x' from 'json'", name="json"), QUANTISER, False),
        (ModuleNotFoundError("No module named 'json'", name="json"), QUANTISER, False),
        (ImportError("libcudart.so.12: cannot open shared object file"), "/site-packages/gptqmodel/x.py", False),
        (ValueError("a device map with cpu"), QUANTISER, False),
        (ModuleNotFoundError("No module named 'absent'", name="absent"), "/home/me/ourapp/serving.py", False),
    ],
)
def test_what_is_missing_is_told_from_what_is_broken(error: Exception, file: str, is_missing: bool) -> None:
    assert bool(missing_requirement(raised(error, file))) == is_missing


PLANTED = """
import transformers

TEXT = "def load_kernel(*_):\\n    raise ImportError('finegrained-fp8 kernel unavailable: no `kernels` here')\\n"
scope = {}
exec(compile(TEXT, "/site-packages/transformers/integrations/finegrained_fp8.py", "exec"), scope)
real = transformers.PreTrainedModel.from_pretrained.__func__


def from_pretrained(cls, *args, **kwargs):
    found = real(cls, *args, **kwargs)
    (found[0] if isinstance(found, tuple) else found).register_forward_pre_hook(scope["load_kernel"])
    return found


transformers.PreTrainedModel.from_pretrained = classmethod(from_pretrained)
"""


def test_a_kernel_that_the_first_forward_asks_for_is_missing_too(pytester: pytest.Pytester, project: Run) -> None:
    """As FP8's on a GPU, which no test before the forward asks for."""
    pytester.makepyfile(planted=PLANTED, test_it="def test_loads(llm): pass")
    result = project("--llm-import=planted", "-rs")
    # A run that measures nothing at all is an error.
    result.assert_outcomes(skipped=1, errors=1)
    result.stdout.fnmatch_lines(["*lacks a package for this checkpoint: finegrained-fp8 kernel unavailable*"])


@pytest.mark.parametrize(("function", "is_missing"), [("_flash_attn_import_error", True), ("from_pretrained", False)])
def test_only_what_looks_for_an_attention_says_that_it_is_missing(function: str, is_missing: bool) -> None:
    error = ImportError("the package for FlashAttention3 doesn't seem to be installed")
    assert bool(missing_requirement(raised(error, MODEL, function))) == is_missing
