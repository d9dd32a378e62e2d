"""A red memory gate names who allocated what is too much, and so does the report."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable

import pytest

from pytest_llmload.cli import main


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
    project("--llm-update-baselines", "--llm-record-repeats=1", preset=True).assert_outcomes(passed=1)
    (file,) = (pytester.path / "baselines").rglob("*.json")
    assert "allocations" not in json.loads(file.read_text())
    clean = project("--llm-report=clean.json", preset=True)
    clean.assert_outcomes(passed=1)
    (run,) = json.loads((pytester.path / "clean.json").read_text())["runs"]
    assert run["allocations"] == []
    red = project("--llm-import=kept", "--llm-report=red.json", preset=True)
    red.assert_outcomes(failed=1)
    line = (
        "allocated           1.00 MiB by *kept.py:6 in keeps_a_copy (kept after the load, held by the list kept.COPIES)"
    )
    red.stdout.fnmatch_lines([f"*{line}"])
    (run,) = json.loads((pytester.path / "red.json").read_text())["runs"]
    (kept,) = [each for each in run["allocations"] if each["moment"] == "kept"]
    assert (kept["bytes"], kept["place"], kept["held_by"]) == (1 << 20, "host", "the list kept.COPIES")


GROWS = """
    import os, transformers
    _load = transformers.PreTrainedModel.from_pretrained.__func__
    def allocates(cls, *args, **kwargs):
        import torch
        needed = torch.zeros(int(os.environ["SCRATCH"]), dtype=torch.uint8)
        needed.fill_(1)
        return _load(cls, *args, **kwargs)
    transformers.PreTrainedModel.from_pretrained = classmethod(allocates)
"""


def test_todays_lines_stand_beside_the_baselines(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that allocated 24 MiB when the baseline was recorded allocates 72 MiB now."""
    pytester.makepyfile(grows=GROWS, test_it="def test_memory(llm, memory_baseline): memory_baseline.check(llm)")
    monkeypatch.setenv("SCRATCH", str(24 << 20))
    project("--llm-import=grows", "--llm-update-baselines", "--llm-record-repeats=1").assert_outcomes(passed=1)
    (file,) = (pytester.path / "baselines").rglob("*.json")
    plain = json.loads(file.read_text())
    assert "allocations" not in plain
    # A baseline that lacks only the lines gets them, and keeps every figure.
    added = ("--llm-import=grows", "--llm-update-baselines", "--llm-record-repeats=1", "--llm-record-allocations")
    project(*added).assert_outcomes(passed=1)
    recorded = json.loads(file.read_text())
    sites = recorded.pop("allocations")
    assert recorded == plain
    (scratch,) = [each for each in sites if each["moment"] == "load" and "in allocates" in each["site"]]
    assert scratch["bytes"] == 24 << 20
    assert str(pytester.path) not in json.dumps(sites)
    monkeypatch.setenv("SCRATCH", str(72 << 20))
    red = project("--llm-import=grows", "--llm-report=red.json", "--llm-report=red.md", "--llm-report=red.html")
    red.assert_outcomes(failed=1)
    # The line explains it.
    assert "nothing recorded explains it" not in red.stdout.str()
    told = "72.00 MiB by *grows.py:5 in allocates (at the peak of the load, 24.00 MiB in the baseline)"
    red.stdout.fnmatch_lines([f"*allocated *{told}"])
    (run,) = json.loads((pytester.path / "red.json").read_text())["runs"]
    assert [each["baseline"] for each in run["allocations"] if each["bytes"] == 72 << 20] == [24 << 20]
    assert "24.00 MiB in the baseline" in (pytester.path / "red.md").read_text()
    assert "Who allocated it" in (pytester.path / "red.html").read_text()
    # Accepting on another machine takes the lines along, and an update without them removes what has become untrue.
    assert main(["accept", "red.json", "--baselines", "baselines"]) == 0
    accepted = json.loads(file.read_text())["allocations"]
    assert [each["bytes"] for each in accepted if "in allocates" in each["site"]] == [72 << 20]
    monkeypatch.setenv("SCRATCH", str(24 << 20))
    project("--llm-import=grows", "--llm-update-baselines", "--llm-record-repeats=1").assert_outcomes(passed=1)
    assert "allocations" not in json.loads(file.read_text())


OURS = """
    import os
    import torch
    from transformers import LlamaForCausalLM

    SEEN = {}

    class OurModel(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            if "PLANTED" in os.environ:
                torch.zeros(40 << 20, dtype=torch.uint8).fill_(1)
            return found

    def load(spec):
        model = OurModel.from_pretrained(spec.model, dtype="auto")
        if "PLANTED" in os.environ:
            SEEN["embedding"] = model.get_input_embeddings().weight.detach().clone()
        return model
"""


def test_a_users_own_model_is_named_in_a_run_of_several_workers(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pytester.mkpydir("ourapp")
    (package / "model.py").write_text(textwrap.dedent(OURS).lstrip())
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.strategy("loader", target="ourapp.model:load")
        def test_memory(llm, memory_baseline): memory_baseline.check(llm)
        """
    )
    project("--llm-update-baselines", "--llm-record-repeats=1", preset=True).assert_outcomes(passed=1)
    monkeypatch.setenv("PLANTED", "1")
    red = project("-n", "2", preset=True)
    red.assert_outcomes(failed=1)
    red.stdout.fnmatch_lines(
        [
            "  host.other_tensors *0 B -> 1.00 MiB *",
            "  host.peak *",
            "  because * host.other_tensors +1.00 MiB",
            "  allocated * 1.00 MiB by *ourapp/model.py:17 in load (kept *, held by the dict ourapp.model.SEEN)",
            "   * 40.00 MiB by *ourapp/model.py:11 in forward (at the peak of generating)",
        ]
    )
