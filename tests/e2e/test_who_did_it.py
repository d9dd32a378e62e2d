"""A red memory gate names who allocated what is too much, and so does the report."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest


def test_a_kept_copy_is_named_where_the_gate_is_red(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        kept="""
        import transformers
        COPIES = []
        _load = transformers.PreTrainedModel.from_pretrained.__func__
        def keeps_a_copy(cls, *args, **kwargs):
            model, info = _load(cls, *args, **kwargs)
            COPIES.append(next(model.parameters()).detach().clone())
            return model, info
        transformers.PreTrainedModel.from_pretrained = classmethod(keeps_a_copy)
        """,
        test_it="def test_memory(llm, memory_baseline): memory_baseline.check(llm)",
    )
    project("--llm-update-baselines").assert_outcomes(passed=1)
    clean = project("--llm-report=clean.json")
    clean.assert_outcomes(passed=1)
    (run,) = json.loads((pytester.path / "clean.json").read_text())["runs"]
    assert run["allocations"] == []
    red = project("--llm-import=kept", "--llm-report=red.json")
    red.assert_outcomes(failed=1)
    line = (
        "allocated           1.00 MiB by *kept.py:6 in keeps_a_copy (kept after the load, held by the list kept.COPIES)"
    )
    red.stdout.fnmatch_lines([f"*{line}"])
    (run,) = json.loads((pytester.path / "red.json").read_text())["runs"]
    (kept,) = [each for each in run["allocations"] if each["moment"] == "kept"]
    assert (kept["bytes"], kept["place"], kept["held_by"]) == (1 << 20, "host", "the list kept.COPIES")
