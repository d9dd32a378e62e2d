"""Deaths, hangs, changes and calls: each load's process is its own, and so is its end."""

from __future__ import annotations

import json
import os
import select
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from family import assert_nothing_outlives
from warm_template import Template

from pytest_llmload import MachineError
from pytest_llmload.host.loads import warm_server
from pytest_llmload.host.loads.processes import LoadProcess, fork
from pytest_llmload.host.loads.warm_server import WarmServer
from pytest_llmload.system.scratch import LOGS, Scratch


def test_four_ways_to_fail_are_four_failures_and_the_next_test_runs(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        loaders="""
        import os, signal, sys, threading
        def killed(spec):
            print("about to be killed")
            os.kill(os.getpid(), signal.SIGKILL)
        def segfault(spec):
            import ctypes
            ctypes.string_at(0)
        def out_of_memory(spec):
            import torch
            print("asking for too much")
            torch.empty(1 << 60, dtype=torch.uint8)
        def hang(spec):
            print("hanging on purpose")
            threading.Event().wait()
        def raises(spec):
            raise KeyError("no such layer")
        def leaves(spec):
            sys.exit("config file llm.toml is missing")
        def gives_up(spec):
            import pytest
            pytest.fail("given up inside")
        def interrupted(spec):
            raise KeyboardInterrupt("from within")
        """,
        test_it="""
        import pytest
        from pytest_llmload import LoadCrashed, LoadOutOfMemory
        def loader(name): return pytest.mark.strategy("loader", target=f"loaders:{name}")
        @loader("killed")
        def test_killed(llm): pass
        @loader("segfault")
        def test_segfault(llm): pass
        @loader("out_of_memory")
        def test_out_of_memory(llm): pass
        @loader("hang")
        def test_hang(llm): pass
        @loader("raises")
        def test_raises(llm): pass
        @loader("leaves")
        def test_leaves(llm): pass
        @loader("gives_up")
        def test_gives_up(llm): pass
        @loader("interrupted")
        def test_interrupted(llm): pass
        @loader("killed")
        @pytest.mark.xfail(raises=LoadCrashed, strict=True)
        def test_expected(llm): pass
        @pytest.fixture(scope="module")
        def answer(llm): return llm.generate("x", max_new_tokens=2)
        @loader("raises")
        def test_through_a_fixture(answer): pass
        @pytest.mark.dtype("bf16")
        def test_next(llm): assert llm.outcome == "loaded"
        """,
    )
    result = project("-v", "-k", "not hang")
    result.assert_outcomes(failed=8, passed=1, xfailed=1, deselected=1)
    # Apart from the others, which may take longer than a test wants to wait for. The time has to last until the load
    # hangs: how long its process takes to get there is the machine's.
    for seconds in (2, 8, 32):
        hanging = project(f"--llm-timeout={seconds}s", "-k", "test_hang or test_raises")
        if all(piece in hanging.stdout.str() for piece in ("in hang", "no such layer")):
            break
    hanging.assert_outcomes(failed=2, deselected=9)
    text = result.stdout.str() + hanging.stdout.str()
    for piece in (
        "the load's process died: tiny-llama / loader",
        "killed by SIGKILL in phase 'load'",
        "about to be killed",
        "killed by SIGSEGV in phase 'load'",
        "Fatal Python error: Segmentation fault",
        "out of memory: tiny-llama / loader",
        "asking for too much",
        "the load timed out: tiny-llama / loader",
        f"still in phase 'load' after {seconds} s",
        "hanging on purpose",
        "in hang",
        "the load failed: tiny-llama / loader",
        "KeyError: 'no such layer'",
        "SystemExit: config file llm.toml is missing",
        "in leaves",
        "Failed: given up inside",
        "in gives_up",
        "exited with status 70 in phase 'load'",
        "KeyboardInterrupt: from within",
    ):
        assert piece in text, piece


def test_calls_travel_and_their_errors_come_back(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    # As in a user's process of pytest: it never imports torch, whose errors it therefore does not know.
    pytester.makeconftest(
        """
        import sys
        for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "transformers")]:
            del sys.modules[name]
        """
    )
    pytester.makepyfile(
        helper="def count(model, tokenizer, kind): return sum(kind in name for name, _ in model.named_parameters())",
        test_it="""
        import threading
        import pytest
        from pytest_llmload import RemoteError
        FACTOR = 3
        def parameters(model, tokenizer, factor=1):
            assert model is not None
            return factor * FACTOR * len(list(model.parameters()))
        class Odd(Exception): pass
        def odd(model, tokenizer):
            import transformers, queue
            raise queue.Full("too much")
        def torch_error(model, tokenizer):
            import torch
            raise torch.cuda.OutOfMemoryError("none left")
        def fails(model, tokenizer):
            assert 1 == 2, "not equal"
        def leaves(model, tokenizer):
            raise SystemExit("no such file")
        def gives_up(model, tokenizer):
            import pytest
            pytest.fail("given up inside")

        def test_values(llm):
            n = llm.run(parameters, factor=2)
            assert n % 6 == 0 and n > 0
            assert llm.run(lambda m, t: {"a": [1, (2.5, b"x")], "n": None}) == {"a": [1, (2.5, b"x")], "n": None}
            assert llm.run("helper:count", "mlp") == 6
        def test_tensor(llm):
            with pytest.raises(TypeError, match="tolist"):
                llm.run(lambda m, t: next(m.parameters()))
        def test_foreign(llm):
            with pytest.raises(RemoteError) as caught:
                llm.run(torch_error)
            assert caught.value.type_name == "torch.OutOfMemoryError"
            assert "in torch_error" in caught.value.traceback
        def test_own(llm):
            with pytest.raises(AssertionError, match="not equal"):
                llm.run(fails)
        @pytest.mark.parametrize(("function", "text", "kind"), [
            (leaves, "no such file.*in leaves", RemoteError), (gives_up, "given up inside", pytest.fail.Exception)
        ])
        def test_no_exception(llm, function, text, kind):
            with pytest.raises(kind, match=f"(?s){text}"):
                llm.run(function)
        def test_unsendable(llm):
            lock = threading.Lock()
            with pytest.raises(TypeError, match="cannot go to the load's process"):
                llm.run(lambda m, t: lock)
        def test_generate(llm):
            one, two = llm.generate("Hello", max_new_tokens=5), llm.generate("Hello", max_new_tokens=5)
            assert len(one.tokens) == 5 and one == two
        """,
    )
    project().assert_outcomes(passed=8)


def test_a_failure_in_the_loads_process_says_where_the_test_was(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        import os

        def odd(model, tokenizer):
            raise __import__("graphlib").CycleError("boom")
        def killed(model, tokenizer): os.kill(os.getpid(), 9)
        def called(llm, function):
            return llm.run(function)
        def test_odd(llm): called(llm, odd)
        def test_killed(llm):
            called(llm, killed)
        """
    )
    result = project()
    result.assert_outcomes(failed=2)
    places = [line.partition(".py:")[2] for line in result.stdout.lines if ": in " in line]
    assert places == ["8: in test_odd", "7: in called", "10: in test_killed", "7: in called"]


def test_a_changed_model_is_not_handed_on_and_figures_are_frozen(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        import pytest
        pytestmark = pytest.mark.dtype("bf16")
        def kind(model, tokenizer): return str(next(model.parameters()).dtype)
        def zero(model, tokenizer):
            import torch
            with torch.no_grad(): next(model.parameters()).zero_()
        def first(model, tokenizer): return float(next(model.parameters()).abs().sum())
        seen = []
        def test_one(llm):
            seen.append(dict(llm.metrics))
            llm.run(lambda m, t: m.to("cpu", dtype=__import__("torch").float32) and None)
            assert llm.run(kind) == "torch.float32"
        def test_two(llm):
            assert llm.run(kind) == "torch.bfloat16"
            llm.run(zero)
            assert llm.run(first) == 0
        def test_three(llm):
            assert llm.run(first) > 0
            assert dict(llm.metrics) == seen[0]
        """
    )
    project().assert_outcomes(passed=3)


def test_monkeypatched_environment_reaches_the_load(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        import os
        def value(model, tokenizer): return os.environ.get("OUR_SWITCH"), os.getppid()
        def test_a(llm_load, monkeypatch):
            plain, server = llm_load(dtype="bf16").run(value)
            monkeypatch.setenv("OUR_SWITCH", "on")
            changed, parent = llm_load(dtype="bf16").run(value)
            assert (plain, changed) == (None, "on")
            assert server != parent, "a load whose environment differs starts with exec"
            assert llm_load(dtype="bf16", env={"OUR_SWITCH": "off"}).run(value)[0] == "off"
        """
    )
    project(servers=5).assert_outcomes(passed=1)


# Killed, it is as a user starts it: nothing that it could still do itself ends what it has started.
@pytest.mark.parametrize(
    ("number", "is_forked"), [(signal.SIGKILL, False), (signal.SIGINT, True), (signal.SIGTERM, True)]
)
def test_nothing_outlives_pytest(
    pytester: pytest.Pytester,
    checkpoint_cache: Path,
    number: signal.Signals,
    is_forked: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warm_template: Template,
) -> None:
    """Killed while a load hangs in a C call: server, load and what the load started are gone, and the logs in time."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pytester.makepyfile(
        loaders="""
        import signal, subprocess
        def slow(spec):
            subprocess.Popen(["sleep", "300"])
            subprocess.Popen(["sleep", "300"], start_new_session=True)
            print("started", flush=True)
            open("started", "w").close()
            signal.pause()
        """,
        test_it="""
        import pytest
        @pytest.mark.strategy("loader", target="loaders:slow")
        def test_a(llm): pass
        """,
    )

    def check(family: set[int]) -> None:
        assert len(family) >= 4, "server, load and the load's own children"
        assert [Path(f"/proc/{pid}/comm").read_text() for pid in family].count("sleep\n") == 2

    assert_nothing_outlives(pytester, checkpoint_cache, number, check, template=warm_template if is_forked else None)
    # As the next run does.
    Scratch(LOGS).close()
    assert list(tmp_path.glob("pytest-llmload-*")) == []


def test_a_server_that_may_not_fork_is_replaced_and_said(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    """A thread in the server makes forking unsafe: the next load starts with exec, and the summary says why."""
    pytester.makepyfile(
        # The server imports the modules of a run's strategies before its first fork.
        ours="""
        import os, threading
        from pytest_llmload.strategies import Strategy
        def start():
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        os.register_at_fork(after_in_parent=start)
        class Threads(Strategy):
            name, summary, fields = "threads", "Its module starts a thread.", {"strategy": "threads"}
        """,
        conftest="""
        def pytest_llmload_strategies(config): return {"threads": "ours:Threads"}
        """,
        test_it="""
        import pytest
        @pytest.mark.strategy("threads")
        @pytest.mark.dtype("bf16", "fp32")
        def test_a(llm): assert llm.outcome == "loaded"
        """,
    )
    result = project(servers=4)
    result.assert_outcomes(passed=2)
    assert "loads started without the warm server: it runs 2 threads, 1 after its imports" in result.stdout.str()


def test_a_server_in_which_cuda_was_touched_does_not_fork(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("class cuda:\n    is_initialized = staticmethod(lambda: True)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    server = WarmServer(tmp_path / "server.log", environment)
    try:
        server.warm_up(["torch"], None)
        assert server.fork(tmp_path / "load.log") == "CUDA is initialised in it"
    finally:
        server.close()


@pytest.mark.parametrize("own_session", [False, True])
def test_a_load_has_ended_when_all_that_it_started_has(tmp_path: Path, own_session: bool) -> None:
    """A killed process holds its GPU until the kernel is through with it, here with giving back its memory."""
    (tmp_path / "leaver.py").write_text(
        textwrap.dedent(
            """
            import subprocess, sys
            from pytest_llmload.process.session import Session
            def do_run(self, message):
                grandchild = "block = bytearray(b'1') * (1 << 30); print(flush=True); import signal; signal.pause()"
                code = (
                    "import signal, subprocess, sys; new = sys.argv[2] == 'True'; "
                    "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=new); "
                    "print(child.pid, flush=True); signal.pause()"
                )
                child = subprocess.Popen(
                    [sys.executable, "-c", code, grandchild, str(message["own"])],
                    stdout=subprocess.PIPE,
                    start_new_session=message["own"],
                )
                # The grandchild's empty line and its number, in either order.
                (number,) = filter(str.strip, (child.stdout.readline().decode() for _ in range(2)))
                return {"kind": "value", "pids": [child.pid, int(number)]}
            Session.do_run = do_run
            """
        )
    )
    server = WarmServer(tmp_path / "server.log", {**os.environ, "PYTHONPATH": str(tmp_path)})
    try:
        server.warm_up(["leaver"], None)
        load = fork(server, tmp_path / "load.log")
        assert isinstance(load, LoadProcess)
        pids = load.request({"kind": "run", "own": own_session}, 60.0)["pids"]
        load.close()
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    finally:
        server.close()


def test_a_server_that_cannot_import_is_an_error_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    server = WarmServer(tmp_path / "server.log", {**os.environ, "PYTHONPATH": str(tmp_path)})
    server.warm_up(["torch"], None)
    server.warm_up(["json"], None)
    try:
        with pytest.raises(MachineError, match=r"imports torch (.|\n)*died \(exited with status 1\):(.|\n)*libcudart"):
            server.fork(tmp_path / "load.log")
    finally:
        server.close()


def test_a_server_that_is_closed_while_it_imports_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_server, "_GRACE", 10.0)
    (tmp_path / "slow.py").write_text(
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\nprint('here')\nsignal.pause()\n"
    )
    log = tmp_path / "server.log"
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    server = WarmServer(log, {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": "1"})
    server.warm_up(["slow"], None)
    assert select.select([reader], [], [], 60)[0]
    begin = time.monotonic()
    server.close()
    assert time.monotonic() - begin < 10.0
    os.close(reader)


def test_a_server_that_was_killed_is_an_error_of_the_machine_for_its_load_and_for_the_next(tmp_path: Path) -> None:
    (tmp_path / "killer.py").write_text(
        textwrap.dedent(
            """
            import os, signal
            from pytest_llmload.process.session import Session
            def do_run(self, message):
                os.kill(os.getppid(), signal.SIGKILL)
                signal.pause()
            Session.do_run = do_run
            """
        )
    )
    server = WarmServer(tmp_path / "server.log", {**os.environ, "PYTHONPATH": str(tmp_path)})
    try:
        server.warm_up(["killer"], None)
        load, idle = (fork(server, tmp_path / f"{name}.log") for name in ("load", "idle"))
        assert isinstance(load, LoadProcess)
        assert isinstance(idle, LoadProcess)
        with pytest.raises(MachineError, match=r"died \(killed by SIGKILL\), and the load with it in phase"):
            load.request({"kind": "run"}, 60.0)
        assert not load.alive
        with pytest.raises(MachineError, match=r"the process that loads are forked from died \(killed by SIGKILL\):"):
            server.fork(tmp_path / "next.log")
    finally:
        server.close()
    # Its owner may not have seen it yet.
    idle.close()
    assert not idle.alive


def test_a_killed_server_is_replaced(pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]) -> None:
    """By the kernel, say: the load that it was killed under is an error, and all others go on."""
    pytester.makepyfile(
        """
        import pytest
        def kill(model, tokenizer):
            import os, signal
            os.kill(os.getppid(), signal.SIGKILL)
            signal.pause()
        def server(model, tokenizer): return __import__("os").getppid()
        @pytest.mark.dtype("bf16")
        class TestOne:
            def test_killed(self, llm): llm.run(kill)
            def test_loaded_again(self, llm):
                import os, signal, select
                pid = llm.run(server)
                watched = os.pidfd_open(pid)
                os.kill(pid, signal.SIGKILL)
                select.select([watched], [], [])
        @pytest.mark.dtype("fp32")
        def test_next(llm): assert llm.run(server) > 0
        """
    )
    result = project(servers=4)
    result.assert_outcomes(errors=1, passed=2)
    text = result.stdout.str()
    assert "loads are forked from died (killed by SIGKILL), and the load with it in phase 'run'" in text
    assert "Closed" not in text


def test_what_was_seen_before_memory_ran_out_is_reported(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    """A model that loads and does not run: its weights and its time to load are known."""
    pytester.makepyfile(
        loaders="""
        import torch, transformers
        def too_large_to_run(spec):
            model = transformers.AutoModelForCausalLM.from_pretrained(spec.model)
            def hook(*args): torch.empty(1 << 60, dtype=torch.uint8)
            model.lm_head.register_forward_pre_hook(hook)
            return model
        """,
        test_it="""
        import pytest
        @pytest.mark.strategy("loader", target="loaders:too_large_to_run")
        def test_a(llm): pass
        """,
    )
    result = project("--llm-report=seen.json")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["out of memory: tiny-llama / loader*", "*phase    forward"])
    (run,) = json.loads((pytester.path / "seen.json").read_text())["runs"]
    assert run["load"] == "out_of_memory"
    assert run["metrics"]["host.weights"] > 1 << 20
    assert run["metrics"]["load"] == run["phases"]["load"] > 0
    assert "forward" not in run["phases"]
