"""Which baselines a run calls stale: none that a test which was left out may own."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_llmload.baselines.codec import dumps
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.host.run import partial_runs

OWNERS = {
    "test_one": """
        import pytest
        @pytest.mark.skip
        @pytest.mark.quant("nf4")
        def test_a(llm_spec, memory_baseline): pass
    """,
    "test_two": """
        import pytest
        @pytest.mark.skip
        def test_b(llm_spec, memory_baseline): pass
        def test_c(): pass
    """,
}
DESELECTS = """
    def pytest_collection_modifyitems(config, items):
        gone = [item for item in items if "test_b" in item.name]
        {said}
        items[:] = [item for item in items if item not in gone]
"""
IMPORT_ERROR = {"test_two": "import nothing_like_it"}
SKIPPED = {"test_two": "import pytest\npytest.importorskip('nothing_like_it')"}
LEAVES = {"test_two": "import pytest\npytest.exit('enough', returncode=1)"}


def committed(pytester: pytest.Pytester, name: str, *, device: str = "", **fields: Any) -> None:
    """A baseline of this machine's CPU."""
    folder = pytester.path / "baselines" / "tiny-llama" / f"cpu-{platform.machine()}{device}"
    folder.mkdir(parents=True, exist_ok=True)
    baseline = Baseline(**{"shape": "s", "weights": "w", "spec": {}, "workload": "1x8+3", **fields})
    (folder / f"{name}.json").write_text(dumps(baseline))


@pytest.fixture
def stale(pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]) -> Callable[..., list[str]]:
    """What a run calls stale, where nf4 and none have an owner and int8 has none."""
    for name in ("nf4", "none", "int8"):
        committed(pytester, name)
    pytester.makepyfile(**OWNERS)
    # As the command line's: a run of another workload than the usual one is asked for something else.
    pytester.makeini("[pytest]\nllm_workload = 1x8+3\n")

    def run(*arguments: str) -> list[str]:
        report = pytester.path / "run.json"
        result = project("--llm-report=run.json", *arguments)
        assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
        assert "Traceback" not in result.stderr.str()
        return [name.rpartition("/")[2] for name in json.loads(report.read_text())["stale"]]

    return run


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
def test_what_no_test_owns_is_stale(stale: Callable[..., list[str]], workers: tuple[str, ...]) -> None:
    assert stale(*workers) == ["int8.json"]


@pytest.mark.parametrize(
    "argument",
    [
        "--ignore=test_two.py",
        "--ignore-glob=*two.py",
        "--deselect=test_two.py::test_b",
        "test_one.py",
        "--llm-loader=ours:load",
        "--llm-adapter=random",
        "--llm-endpoint=http://127.0.0.1:9",
        "--llm-workload=2x8+3",
    ],
)
def test_nothing_is_stale_in_a_run_that_was_asked_for_less(stale: Callable[..., list[str]], argument: str) -> None:
    assert stale(argument) == []


@pytest.mark.parametrize(
    ("files", "arguments"),
    [
        ({"conftest": DESELECTS.format(said="config.hook.pytest_deselected(items=gone)")}, ()),
        ({"conftest": DESELECTS.format(said="")}, ("-n", "2")),
        (IMPORT_ERROR, ()),
        (IMPORT_ERROR, ("--continue-on-collection-errors",)),
        (IMPORT_ERROR, ("-n", "2")),
        (SKIPPED, ()),
        (SKIPPED, ("-n", "2")),
        (LEAVES, ()),
    ],
    ids=["deselected", "taken-out", "error", "error-ignored", "error-workers", "skipped", "skipped-workers", "left"],
)
def test_nothing_is_stale_where_tests_were_not_collected(
    pytester: pytest.Pytester, stale: Callable[..., list[str]], files: dict[str, str], arguments: tuple[str, ...]
) -> None:
    pytester.makepyfile(**files)
    assert stale(*arguments) == []


def test_a_file_that_is_none_owns_nothing(pytester: pytest.Pytester, stale: Callable[..., list[str]]) -> None:
    """Emacs' lock of an open file is a link to nowhere."""
    (pytester.path / "elsewhere").mkdir()
    (pytester.path / "elsewhere" / ".#lock_test.py").symlink_to("somebody@host.1234:5678")
    assert stale("test_one.py", "test_two.py") == ["int8.json"]


def test_a_file_that_cannot_be_read_may_own_anything(tmp_path: Path) -> None:
    assert partial_runs._may_own(tmp_path)
    (tmp_path / "test_other.py").write_text("def test_a(): pass")
    assert not partial_runs._may_own(tmp_path / "test_other.py")


def test_a_run_that_ends_before_its_tests_has_one_error(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(test_one="def test_a(llm): pass", **IMPORT_ERROR)
    result = project()
    result.assert_outcomes(errors=1)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert "none was measured" not in result.stdout.str()


SUITE = """
    import pytest
    from pytest_llmload.suite import *
    pytestmark = pytest.mark.skip
"""


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "workers"])
def test_what_the_suite_recorded_is_stale_only_beside_the_suite(
    pytester: pytest.Pytester, stale: Callable[..., list[str]], workers: tuple[str, ...]
) -> None:
    committed(pytester, "old", suite=True)
    assert stale(*workers) == ["int8.json"]
    pytester.makepyfile(test_suite=SUITE)
    assert stale(*workers) == ["old.json"], "the suite loads int8 itself"


def test_what_the_suite_leaves_out_is_not_stale(pytester: pytest.Pytester, stale: Callable[..., list[str]]) -> None:
    pytester.makepyfile(test_suite=SUITE)
    for name in ("tp_plan", "deepspeed", "loader"):
        committed(pytester, f"{name}-x2", spec={"strategy": name})
    committed(pytester, "none+old")
    assert stale() == ["none+old.json"]


def test_what_was_recorded_on_more_gpus_is_not_stale(
    pytester: pytest.Pytester, stale: Callable[..., list[str]]
) -> None:
    committed(pytester, "none", device="-x2")
    assert stale() == ["int8.json"]


def test_nothing_is_stale_where_a_test_did_not_get_to_load(
    pytester: pytest.Pytester, stale: Callable[..., list[str]]
) -> None:
    pytester.makepyfile(test_body="def test_body(llm_load, memory_baseline): assert 0")
    assert stale() == []


def test_stale_files_are_listed_without_a_load_too(
    pytester: pytest.Pytester, stale: Callable[..., list[str]], project: Callable[..., pytest.RunResult]
) -> None:
    result = project()
    result.stdout.fnmatch_lines(["stale baselines (not used by any test in this run):", "  baselines/*/int8.json"])
