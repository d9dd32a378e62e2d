"""A quantisation method of one's own: one file and one hook, and quant() takes its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., pytest.RunResult]
METHOD = Path(__file__).parents[1] / "worker" / "rows_method.py"
HOOK = """
    def pytest_llmload_quantisation(config):
        return ["rows_method:Rows"]
"""


@pytest.fixture
def registered(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(HOOK)
    shutil.copy(METHOD, pytester.path)
    return pytester


def test_its_scheme_is_loaded_checked_described_and_planned(registered: pytest.Pytester, project: Run) -> None:
    registered.makepyfile(
        """
        import pytest

        @pytest.mark.quant("rows-int8")
        def test_a(llm):
            rows = {row.quant for row in llm.manifest if row.module.endswith("_proj")}
            assert rows == {"rows-int8 scale=float32"}
            assert llm.spec.slug == "rows-int8"
        """
    )
    project("--llm-report=run.json").assert_outcomes(passed=1)
    (run,) = json.loads((registered.path / "run.json").read_text())["runs"]
    assert run["id"] == "tiny-llama-rows-int8"


def _install(folder: Path, release: str) -> None:
    """Put a release of the package that the method needs on the path of the tests."""
    (folder / "rows_kernels.py").write_text("")
    shutil.rmtree(next(folder.glob("rows_kernels-*"), folder / "none"), ignore_errors=True)
    information = folder / f"rows_kernels-{release}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rows-kernels\nVersion: {release}\n")


def test_what_its_library_changes_is_red_and_explained(registered: pytest.Pytester, project: Run) -> None:
    method = registered.path / "rows_method.py"
    text = METHOD.read_text().replace('    name = "rows"\n', '    name = "rows"\n    packages = ("rows_kernels",)\n')
    method.write_text(text)
    registered.makepyfile(
        """
        import pytest

        @pytest.mark.quant("rows-int8")
        def test_a(llm, memory_baseline):
            memory_baseline.check(llm)
        """
    )
    missing = project("-rs")
    missing.assert_outcomes(skipped=1, errors=1)
    missing.stdout.fnmatch_lines(["*rows-int8 needs rows_kernels, not installed: pip install rows-kernels"])

    _install(registered.path, "1.0")
    project("--llm-update-baselines", "--llm-record-repeats=1").assert_outcomes(passed=1)
    (file,) = registered.path.glob("baselines/tiny-llama/*/rows-int8.json")
    assert json.loads(file.read_text())["environment"]["rows_kernels"] == "1.0"

    _install(registered.path, "1.1")
    method.write_text(text.replace('register_buffer("scales", scales)', 'register_buffer("scales", scales.double())'))
    red = project("--llm-report=run.md", "--llm-report=run.json")
    red.assert_outcomes(failed=1)
    red.stdout.fnmatch_lines(
        [
            "memory regressed: tiny-llama / rows-int8 on *",
            "*host.weights * -> *",
            "*because *14 x RowsLinear: scale float32 -> float64*",
            "*changed *rows_kernels 1.0 -> 1.1*",
        ]
    )
    assert "scale float32 -> float64" in (registered.path / "run.md").read_text()
    (run,) = json.loads((registered.path / "run.json").read_text())["runs"]
    assert {row["quant"] for row in run["manifest"]} >= {"rows-int8 scale=float64"}


def test_what_it_leaves_dense_fails(registered: pytest.Pytester, project: Run) -> None:
    text = METHOD.read_text().replace('path.endswith("_proj")', 'path.endswith("q_proj")')
    (registered.path / "rows_method.py").write_text(text)
    registered.makepyfile('import pytest\n@pytest.mark.quant("rows-int8")\ndef test_a(llm): pass')
    found = project()
    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(["*of the quantisable weights are rows-int8: 12 weights*dense: rows left it alone*"])


def test_a_scheme_that_two_methods_declare_is_refused(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makeconftest(HOOK)
    (pytester.path / "rows_method.py").write_text(METHOD.read_text().replace('"rows-int8"', '"nf4"'))
    pytester.makepyfile("def test_a(llm): pass")
    project().stderr.fnmatch_lines(["*scheme 'nf4' is declared by two quantisation methods: bitsandbytes, rows*"])
