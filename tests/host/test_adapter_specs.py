"""Adapters in options and markers: what they are called, and which loads they make."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.host.loads.strategies import Strategies
from pytest_llmload.host.settings.adapters import location, parse_adapter


def collected(result: pytest.RunResult) -> list[str]:
    return sorted(line.split("::")[1] for line in result.outlines if "::" in line)


def test_strategies_are_sugar_for_the_markers(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.strategy("lora", "qlora")
        def test_strategies(llm): pass
        @pytest.mark.quant("nf4")
        @pytest.mark.lora()
        def test_markers(llm): pass
        @pytest.mark.strategy("qlora", via="load_adapter")
        def test_options(llm): pass
        @pytest.mark.strategy("qlora")
        @pytest.mark.lora(adapter="org/adapter", merged=True)
        def test_together(llm): pass
        @pytest.mark.strategy("auto")
        @pytest.mark.lora("random")
        @pytest.mark.dtype("fp16")
        def test_placed(llm): pass
        """
    )
    names = collected(project("--collect-only", "-q"))
    (together,) = [name for name in names if name.startswith("test_together")]
    assert together.startswith("test_together[tiny-llama-nf4+lora-merged+")
    assert names == sorted(
        [
            "test_markers[tiny-llama-nf4+lora]",
            "test_options[tiny-llama-nf4+lora-load_adapter]",
            "test_placed[tiny-llama-auto-fp16+lora]",
            "test_strategies[tiny-llama-nf4+lora]",
            "test_strategies[tiny-llama-none+lora]",
            together,
        ]
    )


def test_the_runs_adapter_is_what_lora_means(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.lora()\ndef test_it(llm): pass")
    (pytester.path / "runs" / "adapter").mkdir(parents=True)
    (named,) = collected(project("--collect-only", "-q", "--llm-adapter=runs/adapter"))
    expected = LoadSpec(model="m", name="tiny-llama", adapter="./runs/adapter")
    assert named == f"test_it[{expected.id}]"
    wrong = project("--collect-only", "-q", "--llm-adapter=./none")
    assert wrong.ret == pytest.ExitCode.USAGE_ERROR
    wrong.stderr.fnmatch_lines(["*'./none' is not a directory on this machine*"])


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ('lora("./none")', "'./none' is not a directory on this machine"),
        ('lora("a/b/c")', "neither a directory on this machine nor a hub id"),
        ('lora(via="magic")', "unknown via='magic'; write 'peft' or 'load_adapter'"),
        ('strategy("lora", via="magic")', "unknown via='magic'"),
    ],
)
def test_wrong_adapters_are_usage_errors(
    marker: str, message: str, pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(f"import pytest\n@pytest.mark.{marker}\ndef test_it(llm): pass")
    result = project("--collect-only", "-q")
    assert result.ret != 0
    assert message in result.stdout.str() + result.stderr.str()


def test_a_directory_is_called_the_same_on_every_machine(tmp_path: Path) -> None:
    slugs = set()
    for machine in ("here", "there"):
        root = tmp_path / machine / "project"
        (root / "runs" / "17").mkdir(parents=True)
        inside = parse_adapter("17", root / "runs", root)
        assert inside == "./runs/17"
        assert location(inside, root) == os.fspath(root / "runs" / "17")
        outside = tmp_path / machine / "mnt" / "adapter"
        outside.mkdir(parents=True)
        absolute = parse_adapter(os.fspath(outside), root, root)
        assert location(absolute, root) == absolute == os.fspath(outside)
        slugs.add(tuple(LoadSpec(model="m", name="m", adapter=spec).slug for spec in (inside, absolute)))
    ((inside, absolute),) = slugs
    assert inside != absolute


def test_a_hub_id_is_left_alone(tmp_path: Path) -> None:
    for text in ("random", "org/adapter", "org/adapter@main"):
        assert parse_adapter(text, tmp_path, tmp_path) == text == location(text, tmp_path)


def test_what_an_adapter_needs(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    strategies = Strategies(pytestconfig)
    assert strategies.missing_packages(LoadSpec(model="m", name="m", adapter="random")) == ["peft"]
    assert strategies.missing_packages(LoadSpec(model="m", name="m")) == []
