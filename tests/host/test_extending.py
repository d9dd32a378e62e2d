"""Extensions by users and contributors, each in one file: shown, compared, reported and documented like ours."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]

REPORT_FORMAT = """
    from pytest_llmload.reports.formats import WRITERS

    def verdict_lines(document):
        '''One line a load: its id and its verdict.'''
        return "".join(f"{run['id']},{run['verdict']}\\n" for run in document["runs"])

    WRITERS[".csv"] = verdict_lines
"""

PROBE = """
    from pathlib import Path
    from pytest_llmload.probes import Metric, Probe

    class Power(Probe):
        metrics = (
            Metric("power.joules", "J", "driver", "2%", "Energy of generating the workload"),
            Metric("power.switches", "1", "work", description="Changes of the clock"),
        )

        def generating(self):
            self.joules = float(Path("joules").read_text())

        def fill(self, result):
            result.metrics["power.joules"] = self.joules
            result.metrics["power.switches"] = 3

    class Careless(Power):
        def fill(self, result):
            super().fill(result)
            result.metrics["power.watts"] = 7
"""
GATED = """
    def test_a(llm, memory_baseline):
        assert llm.metrics["power.switches"] == llm.work["power.switches"] == 3
        memory_baseline.check(llm, metrics=["power.joules"])
"""

STRATEGY = """
    from pytest_llmload.core.results import Problem
    from pytest_llmload.strategies import Strategy

    class HalfContext(Strategy):
        name = "half_context"
        summary = "Everything on one device, with half of the positions."
        fields = {"strategy": "half_context"}
        options = ("divide_by",)

        @classmethod
        def refuses(cls, spec, endpoint):
            return "divide_by=0 leaves no positions" if spec.option("divide_by") == 0 else ""

        def load(self, job, kwargs):
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(job.checkpoint.path)
            config.max_position_embeddings //= job.spec.option("divide_by", 2)
            return super().load(job, {**kwargs, "config": config, "device_map": {"": "cpu"}})

        def applied(self, job, loaded):
            if loaded.config.max_position_embeddings > 4096:
                yield Problem("positions", f"the model has {loaded.config.max_position_embeddings} positions")
"""
MARKER = """
    from pytest_llmload.host.markers.base import LoadMarker, Value
    from pytest_llmload.host.markers.table import LOAD_MARKERS

    class Threads(LoadMarker):
        '''Load with so many threads of the tokenizer.'''

        name = "threads"

        @staticmethod
        def signature(count: int) -> None: ...

        def read(self, args, kwargs, where):
            return [Value({"env": (("RAYON_NUM_THREADS", str(self.one(args, kwargs))),)})]

    LOAD_MARKERS["threads"] = Threads
"""


def _hook(probe: str) -> str:
    return f"def pytest_llmload_probes(config): return ['ours:{probe}']"


def test_a_probe_with_a_metric_is_gated_and_reported_like_ours(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makepyfile(GATED, ours=PROBE)
    pytester.makeconftest(_hook("Power"))
    energy = pytester.path / "joules"
    energy.write_text("100")
    project("--llm-update-baselines", "--llm-record-repeats=1").assert_outcomes(passed=1)
    (baseline,) = pytester.path.glob("baselines/tiny-llama/*/none.json")
    assert json.loads(baseline.read_text())["memory"] == {"power.joules": 100}

    energy.write_text("103.5")
    red = project("--llm-report=run.json", "--junitxml=junit.xml")
    red.assert_outcomes(failed=1)
    red.stdout.fnmatch_lines(
        [
            "*power.joules  100 J -> 103.5 J  (+3.5 %, tolerance 2 %)",
            "*variant*settled*power.joules*verdict",
            "*none*103.5 J*regressed",
        ]
    )
    run = json.loads((pytester.path / "run.json").read_text())["runs"][0]
    assert run["metrics"]["power.joules"] == 103.5
    assert run["verdicts"]["memory"]["metrics"]["power.joules"]["unit"] == "J"
    assert run["declared"]["power.joules"]["tolerance"] == {"relative": 0.02, "absolute": 0.0}
    assert 'name="llmload.power.joules" value="103.5"' in (pytester.path / "junit.xml").read_text()
    project("--llm-tolerance=power.joules=4J").assert_outcomes(passed=1)


def test_a_strategy_of_ones_own_is_selected_checked_and_recorded(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.strategy("half_context", divide_by=4)
        def test_a(llm, memory_baseline):
            assert llm.run(lambda model, tokenizer: model.config.max_position_embeddings) == 2048
            memory_baseline.check(llm)

        @pytest.mark.strategy("half_context", divide_by=1)
        def test_not_applied(llm): pass
        """,
        ours=STRATEGY,
    )
    pytester.makeconftest("def pytest_llmload_strategies(config): return {'half_context': 'ours:HalfContext'}")
    result = project("--llm-record-missing", "--llm-record-repeats=1", "--llm-report=run.md")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*half_context+* was not applied: tiny-llama*", "*positions  the model has 8192 positions*"]
    )
    assert len(list(pytester.path.glob("baselines/tiny-llama/*/half_context+*.json"))) == 1
    assert "half_context" in (pytester.path / "run.md").read_text()

    # The strategy's next release leaves a quarter of the positions of before.
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.strategy("half_context", divide_by=4)
        def test_a(llm, memory_baseline):
            memory_baseline.check(llm)
        """,
        ours=STRATEGY.replace("//= job", "//= 4 * job"),
    )
    red = project("--llm-report=run.md")
    red.assert_outcomes(failed=1)
    red.stdout.fnmatch_lines(
        ["memory *changed*: tiny-llama / half_context+*", "*config.max_position_embeddings: 2048 -> 512*"]
    )
    assert "config.max_position_embeddings: 2048 -> 512" in (pytester.path / "run.md").read_text()
    pytester.makepyfile("import pytest\n@pytest.mark.strategy('half_context', divide_by=0)\ndef test_a(llm): pass")
    refused = project("--collect-only")
    refused.stderr.fnmatch_lines(["*::test_a: divide_by=0 leaves no positions"])


def test_a_figure_that_no_probe_declares_is_refused(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makepyfile("def test_a(llm): llm.generate('a')", ours=PROBE)
    pytester.makeconftest(_hook("Careless"))
    (pytester.path / "joules").write_text("100")
    result = project()
    result.assert_outcomes(passed=1, errors=1)
    text = " ".join(result.stdout.str().split())
    assert (
        "probe ours.Careless wrote the figure 'power.watts', and its 'metrics' declare power.joules, power.switches; "
        "add a Metric('power.watts', unit, kind) to them, or correct the name"
    ) in text


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (_hook("Absent"), "*pytest_llmload_probes: 'ours:Absent' cannot be imported: *no attribute 'Absent'*"),
        (_hook("Path"), "*pytest_llmload_probes: 'ours:Path' is not a subclass of pytest_llmload.probes.Probe*"),
        (_hook("Thief"), "*pytest_llmload_probes: metric 'gpu.settled' is built in; give your metric *different name*"),
    ],
)
def test_a_probe_that_cannot_be_is_refused_at_start(
    pytester: pytest.Pytester, project: Run, hook: str, message: str
) -> None:
    thief = "    class Thief(Probe):\n        metrics = (Metric('gpu.settled', 'B', 'host'),)\n"
    pytester.makepyfile("def test_a(llm): pass", ours=PROBE + thief)
    pytester.makeconftest(hook)
    result = project()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_a_marker_is_one_class(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makeconftest(MARKER)
    pytester.makepyfile(
        """
        import pytest

        pytestmark = pytest.mark.threads(2)

        def test_of_the_module(llm_spec):
            assert llm_spec.env == (("RAYON_NUM_THREADS", "2"),)

        @pytest.mark.threads(pytest.param(3, id="three"))
        def test_nearest(llm_spec):
            assert llm_spec.env == (("RAYON_NUM_THREADS", "3"),)

        def test_keyword(llm_load):
            llm = llm_load(threads=4)
            assert llm.run(lambda model, tokenizer: __import__("os").environ["RAYON_NUM_THREADS"]) == "4"
            with pytest.raises(TypeError, match="'thread'; did you mean 'threads'.; known: .*, threads,"):
                llm_load(thread=4)
        """
    )
    result = project("--strict-markers", "-v")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["*test_nearest[[]tiny-llama-three[]] PASSED*"])
    shown = project("--markers").stdout.str()
    assert "@pytest.mark.threads(count): Load with so many threads of the tokenizer." in shown
    # What it sets is part of the load's identity: it is recorded, compared and reported.
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.threads(2)
        def test_a(llm, memory_baseline):
            memory_baseline.check(llm)
        """
    )
    project("--llm-record-missing", "--llm-record-repeats=1").assert_outcomes(passed=1)
    (baseline,) = pytester.path.glob("baselines/tiny-llama/*/*.json")
    assert json.loads(baseline.read_text())["spec"]["env"] == [["RAYON_NUM_THREADS", "2"]]
    project("--llm-report=run.json").assert_outcomes(passed=1)
    (run,) = json.loads((pytester.path / "run.json").read_text())["runs"]
    assert run["verdict"] == "ok"
    assert run["spec"]["env"] == [["RAYON_NUM_THREADS", "2"]]
    pytester.makepyfile("import pytest\n@pytest.mark.threads\ndef test_a(llm_spec): pass")
    refused = project("--collect-only")
    refused.stderr.fnmatch_lines(["*threads: missing a required argument: 'count'; write threads(count)"])


def test_a_report_format_is_one_entry_of_a_table(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makeconftest(REPORT_FORMAT)
    pytester.makepyfile("def test_a(llm): pass")
    project("--llm-report=out/run.csv").assert_outcomes(passed=1)
    assert (pytester.path / "out" / "run.csv").read_text() == "tiny-llama-none,measured\n"
    shown = " ".join(project("--help").stdout.str().split())
    assert ".csv. Repeatable." in shown
    refused = project("--llm-report=run.pdf")
    refused.stderr.fnmatch_lines(["*--llm-report: 'run.pdf': its suffix '.pdf' is not the suffix of a report format*"])
