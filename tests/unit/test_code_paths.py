"""Files of code are named the same on every machine, wherever packages are installed."""

from __future__ import annotations

import pytest

from pytest_llmload.core.code_paths import short_path
from pytest_llmload.process.raised import innermost, is_own


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("/venv/lib/python3.12/site-packages/transformers/modeling_utils.py", "transformers/modeling_utils.py"),
        ("/usr/lib/python3/dist-packages/torch/nn/functional.py", "torch/nn/functional.py"),
        ("/venv/lib/python3.12/site-packages/pytest_llmload/plugin.py", "pytest_llmload/plugin.py"),
        ("/home/jo/checkout/pytest_llmload/strategies/loader.py", "pytest_llmload/strategies/loader.py"),
        ("/home/jo/ourapp/serving.py", "ourapp/serving.py"),
        ("serving.py", "serving.py"),
    ],
)
def test_a_file_is_named_from_its_package_on(file: str, shown: str) -> None:
    assert short_path(file) == shown


@pytest.mark.parametrize("packages", ["/venv/lib/python3.12/site-packages", "/usr/lib/python3/dist-packages"])
def test_an_exception_belongs_to_the_code_that_called_torch(packages: str) -> None:
    scope: dict[str, object] = {}
    in_torch = "def linear(): raise RuntimeError('size mismatch')"
    exec(compile(in_torch, f"{packages}/torch/nn/functional.py", "exec"), scope)
    for caller, own in (("pytest_llmload/worker/checks/adapter.py", True), ("bitsandbytes/functional.py", False)):
        with pytest.raises(RuntimeError) as caught:
            exec(compile("linear()", f"{packages}/{caller}", "exec"), scope)
        assert innermost(caught.value) == f"{caller}:1"
        assert is_own(caught.value) is own
