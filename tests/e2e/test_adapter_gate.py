"""Adapters as users meet them: the suite covers them, a damaged one fails, a missing peft is a skip."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

WITHOUT_PEFT = """
    import importlib.util
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "peft" else found(name, *rest)
"""


def test_the_suite_covers_adapters_and_skips_where_peft_is_missing(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    suite = ("--pyargs", "pytest_llmload.suite", "--llm-strategy=qlora")
    listed = project("--pyargs", "pytest_llmload.suite", "--collect-only", "-q").stdout.str()
    assert "test_memory[tiny-llama-none+lora]" in listed
    assert "test_memory[tiny-llama-nf4+lora]" in listed

    project(*suite, "--llm-update-baselines", "--llm-record-repeats=1").assert_outcomes(passed=2)
    (folder,) = (pytester.path / "baselines" / "tiny-llama").iterdir()
    assert [path.name for path in folder.iterdir()] == ["nf4+lora.json"]
    stored = json.loads((folder / "nf4+lora.json").read_text())
    assert stored["memory"]["weights.adapter"] > 0
    assert stored["spec"]["adapter"] == "random"

    pytester.makeconftest(WITHOUT_PEFT)
    skipped = project(*suite, "-rs")
    # The error: tests requested loads, but none was measured.
    skipped.assert_outcomes(skipped=2, errors=1)
    skipped.stdout.fnmatch_lines(["*nf4+lora needs peft, not installed*"])


def test_a_damaged_adapter_in_the_project_fails_and_is_named(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], checkpoint_cache: Path
) -> None:
    pytester.makepyfile(
        damage="""
        import sys
        from pathlib import Path
        import shutil
        from safetensors.torch import load_file, save_file
        from pytest_llmload.worker.checkpoints.random_adapter import resolve_adapter
        from pytest_llmload.worker.checkpoints.resolve import resolve
        cache = Path(sys.argv[1])
        whole = resolve_adapter("random", resolve("random:tiny-llama", cache), cache)
        half = Path("runs/half")
        shutil.copytree(whole, half)
        tensors = load_file(half / "adapter_model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if ".layers.0." not in name}
        save_file(kept, half / "adapter_model.safetensors", {"format": "pt"})
        """,
        test_it="""
        import pytest
        @pytest.mark.lora("runs/half")
        @pytest.mark.quant("nf4")
        def test_half(llm): pass
        """,
    )
    script = pytester.path / "damage.py"
    assert pytester.run(sys.executable, script, checkpoint_cache).ret == 0
    result = project("test_it.py", preset=True)
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert "8 of the adapter's 24 tensors in the model are left at their initial values" in text
    assert "nf4+lora" in text
