"""Endpoints through pytest: recorded, gated, made worse, killed."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from family import assert_nothing_outlives
from warm_template import Template

WORKER_TESTS = Path(__file__).parents[1] / "worker"
sys.path.append(str(WORKER_TESTS))

from fake_server import serving  # noqa: E402

FAKE = WORKER_TESTS / "fake_server.py"
#: The fake server says of each prompt that it had 16 tokens.
WORKLOAD = "--llm-workload=1x16+4"
#: What holds no model starts in no time.
STARTED = f"""
    import pytest
    COMMAND = [{sys.executable!r}, "fake_server.py", "{{port}}", "MODE", "{{model}}", "MEGABYTES"]
    @pytest.mark.strategy("served", command=COMMAND)
    def test_memory(llm, memory_baseline):
        memory_baseline.check(llm)
"""


def started(mode: str, megabytes: int = 8) -> str:
    return STARTED.replace("MODE", mode).replace("MEGABYTES", str(megabytes))


@pytest.fixture(autouse=True)
def script(pytester: pytest.Pytester) -> None:
    """By a relative path: the command is part of the load's name."""
    (pytester.path / "fake_server.py").write_text(FAKE.read_text())


def recorded(pytester: pytest.Pytester) -> dict[str, Any]:
    (file,) = (pytester.path / "baselines").rglob("*.json")
    return {"path": file.relative_to(pytester.path).as_posix(), **json.loads(file.read_text())}


def test_transformers_serve_in_the_suite_is_recorded_and_gated(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    suite = ("--pyargs", "pytest_llmload.suite", "--llm-strategy=served")
    project(*suite, "--llm-update-baselines", "--llm-record-repeats=1").assert_outcomes(passed=2)
    baseline = recorded(pytester)
    assert baseline["path"] == "baselines/tiny-llama/cpu-x86_64/served.json"
    assert set(baseline["memory"]) == {"server.peak", "server.settled"}
    assert baseline["environment"]["server"] == "transformers serve"
    assert "127.0.0.1" not in json.dumps(baseline)
    project(*suite, "--llm-strict", "--llm-record-repeats=1").assert_outcomes(passed=2)


def test_a_server_that_needs_more_is_red_and_what_it_cannot_do_is_said(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        test_a=started("openai"),
        test_b="""
        import pytest
        from test_a import COMMAND
        @pytest.mark.strategy("served", command=COMMAND)
        @pytest.mark.memory_ceiling(host="4MiB")
        @pytest.mark.latency_budget(load="30s", ttft="10s")
        def test_limits(llm): pass
        @pytest.mark.strategy("served", command=COMMAND)
        def test_model(llm):
            for use in (lambda: llm.model, lambda: llm.run("os:getpid")):
                with pytest.raises(RuntimeError, match="the model is in a server, which only answers requests"):
                    use()
            assert llm.memory.server.peak > llm.memory.server.settled > 8 << 20
            assert llm.metrics["served.total.x8"] > llm.timing.ttft > 0
            assert llm.generate("Hello", max_new_tokens=3).text == " w0 w1 w2"
            assert (llm.work, llm.manifest, llm.memory.gpus) == ({}, [], [])
            with pytest.raises(AttributeError, match="whose processes cannot be inspected"):
                llm.memory.host.weights
        """,
    )
    result = project("--llm-update-baselines", "--llm-report=run.json", WORKLOAD)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*memory ceiling exceeded: the host held * while generating*"])
    report = (pytester.path / "run.json").read_text()
    assert "127.0.0.1" not in report
    # The same load by its spec, so by its baseline: what the command starts has grown.
    script = pytester.path / "fake_server.py"
    script.write_text(script.read_text().replace("int(megabytes)", "(int(megabytes) + 64)"))
    (pytester.path / "test_b.py").unlink()
    result = project(WORKLOAD)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["memory regressed: tiny-llama / served*", "  server.settled * -> *"])


def test_how_a_server_failed_is_the_first_line(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        **{f"test_{mode.replace('+', '_')}": started(mode) for mode in ("crash", "openai+dies", "openai+other")}
    )
    result = project()
    result.assert_outcomes(failed=3)
    text = result.stdout.str()
    for piece in (
        "the load's process died: tiny-llama / served",
        "because  the server exited with status 7 before it was healthy",
        "ValueError: no such architecture",
        "the server exited with status 3 in the middle of an answer",
        "CUDA error: device-side assert triggered",
        "was not applied: tiny-llama / served",
        "model  the endpoint serves 'org/other', not ",
    ):
        assert piece in text, piece


def test_a_running_endpoint_is_gated_by_its_cache(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile("def test_memory(llm, memory_baseline): memory_baseline.check(llm)")
    options: tuple[str, ...] = ("--llm-model=prod=org/model", WORKLOAD)
    with serving("tgi") as (url, seen):
        project(*options, f"--llm-endpoint={url}", "--llm-update-baselines", fast=False).assert_outcomes(passed=1)
        # Two that check, five rounds of one and two of eight; to be told its capacity again takes none.
        assert len(seen) <= 2 + 5 + 2 * 8
        baseline = recorded(pytester)
        assert baseline["path"] == "baselines/prod/endpoint/served.json"
        assert baseline["memory"] == {"kv_cache.tokens": 1000}
        assert "127.0.0.1" not in json.dumps(baseline)
        project(*options, f"--llm-endpoint={url}", "--llm-strict", fast=False).assert_outcomes(passed=1)
        # What this machine is matters to a server elsewhere as little as a GPU that is not here.
        options = (*options, "--llm-device=cuda")
        project(*options, f"--llm-endpoint={url}", fast=False).assert_outcomes(passed=1)
    for tokens, outcome, text in ((900, {"failed": 1}, "*kv_cache.tokens  1,000 -> 900*"), (1100, {"passed": 1}, "*")):
        with serving("tgi", cache_tokens=tokens) as (url, _):
            result = project(*options, f"--llm-endpoint={url}", fast=False)
            result.assert_outcomes(**outcome)
            result.stdout.fnmatch_lines([text])
    result = project(*options, f"--llm-endpoint={url}", fast=False)
    # The test's, and that of a run that measured nothing.
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*the endpoint cannot be reached: Connection refused (--llm-endpoint)*"])


#: What hides packages from a process and from all that it starts.
HIDING = """
    import sys
    class Hiding:
        def __init__(self, finder):
            self.finder = finder
        def __getattr__(self, name):
            return getattr(self.finder, name)
        def find_spec(self, name, *more):
            hidden = ("torch", "transformers", "tokenizers", "safetensors", "accelerate")
            return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, *more)
    sys.meta_path[:] = map(Hiding, sys.meta_path)
"""


def test_an_endpoint_is_gated_without_torch(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    """The suite loads nothing else, so that the client needs nothing else."""
    pytester.makepyfile(sitecustomize=HIDING)
    with serving("vllm") as (url, _):
        options = ("--llm-model=org/model", WORKLOAD, f"--llm-endpoint={url}", "--llm-update-baselines")
        result = project("--pyargs", "pytest_llmload.suite", *options, fast=False, cold=True)
    result.assert_outcomes(passed=2)
    assert recorded(pytester)["memory"] == {"kv_cache.tokens": 661 * 16}
    result.stdout.fnmatch_lines(
        [
            "*not loaded by the suite: single, fp32, * more, with --llm-endpoint only if --llm-strategy names it",
            "*no tokenizer of the model is on this machine, so prompts are words (*No module named 'transformers')",
        ]
    )


def test_no_server_outlives_pytest(pytester: pytest.Pytester, checkpoint_cache: Path, warm_template: Template) -> None:
    pytester.makepyfile(
        started("openai").replace(
            "memory_baseline.check(llm)",
            "llm.generate('x', max_new_tokens=1); open('started', 'w').close(); __import__('signal').pause()",
        )
    )

    def check(family: set[int]) -> None:
        servers = [pid for pid in family if "fake_server.py" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(servers) == 1

    options = [WORKLOAD]
    assert_nothing_outlives(pytester, checkpoint_cache, signal.SIGKILL, check, *options, template=warm_template)
