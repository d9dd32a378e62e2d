"""Loads in ranks: what they are, what is planted in them, and that no process outlives them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from family import assert_nothing_outlives
from warm_template import Template

from pytest_llmload.core.presets import config_of

pytest.importorskip("deepspeed")

#: Strategies of a user's own, each with something wrong on the second rank or on all.
PLANTED = """
import os, signal, threading
from pytest_llmload.worker.model.loading import from_pretrained
from pytest_llmload.strategies.deepspeed import DeepSpeed
from pytest_llmload.strategies.tp_plan import TpPlan

class Planted(TpPlan):
    fields = {"world_size": 2}
    def __init_subclass__(cls):
        cls.name = cls.__name__.lower()
        cls.fields = {"strategy": cls.name, "world_size": 2}
    def load(self, job, kwargs):
        if os.environ["RANK"] == "1":
            self.plant()
        return super().load(job, kwargs)

class Killed(Planted):
    def plant(self):
        print("about to be killed")
        os.kill(os.getpid(), signal.SIGKILL)
class Exits(Planted):
    def plant(self): os._exit(7)
class Raises(Planted):
    def plant(self): raise KeyError("no such layer")
class Hangs(Planted):
    def plant(self): threading.Event().wait()

class Whole(TpPlan):
    name, fields = "whole", {"strategy": "whole", "world_size": 2}
    def load_kwargs(self, job):
        return {"device_map": {"": "cpu"}}
class Copied(TpPlan):
    name, fields = "copied", {"strategy": "copied", "world_size": 2}
    def load(self, job, kwargs):
        import torch
        loaded = super().load(job, kwargs)
        with torch.no_grad():
            torch.distributed.broadcast(loaded.model.model.layers[1].mlp.up_proj.weight.to_local(), 0)
        return loaded
class Apart(DeepSpeed):
    '''Each rank sums with itself only.'''
    name, fields = "apart", {"strategy": "apart", "world_size": 2}
    def load(self, job, kwargs):
        loaded = super().load(job, kwargs)
        for module in loaded.model.modules():
            if type(module).__name__ == "LinearAllreduce":
                module.mp_group = None
        return loaded
"""
CONFTEST = """
import planted
NAMES = ("Killed", "Exits", "Raises", "Hangs", "Whole", "Copied", "Apart")
def pytest_llmload_strategies(config):
    return {name.lower(): f"planted:{name}" for name in NAMES}
"""


def test_ranks_load_measure_generate_and_gate(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        import os
        import pytest

        def rank(model, tokenizer):
            import torch
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        def fails(model, tokenizer):
            raise ZeroDivisionError("on every rank")
        def second(model, tokenizer):
            if os.environ["RANK"] == "1":
                raise ZeroDivisionError("on one rank")
        def token(model, tokenizer):
            import torch
            with torch.no_grad():
                return int(model(torch.tensor([[70, 80, 90]])).logits[0, -1].argmax())

        @pytest.mark.strategy("tp_plan", "deepspeed")
        class TestRanks:
            def test_shards(self, llm):
                assert [shard.weights_share for shard in llm.memory.shards] == pytest.approx([0.5, 0.5], abs=0.05)
                assert all(shard.peak > 0 and shard.settled > 0 for shard in llm.memory.shards)
                assert {row.device for row in llm.manifest} == {"2 x cpu"}
                assert llm.environment["ranks"] == "2"
                assert llm.timing.load > 0 and len(llm.timing.samples["per_token"]) == 6
                assert any("2 x its own error" in note for note in llm.result.notes)
            def test_calls(self, llm):
                assert llm.run(rank) == (0, 2)
                with pytest.raises(ZeroDivisionError, match="on every rank"):
                    llm.run(fails)
                with pytest.raises(ZeroDivisionError, match="on one rank"):
                    llm.run(second)
                assert llm.run(token) == llm.run(token)
                one, two = llm.generate("Hello", max_new_tokens=8), llm.generate("Hello", max_new_tokens=8)
                assert len(one.tokens) == 8 and one == two

        @pytest.mark.strategy("tp_plan")
        def test_gate(llm, memory_baseline):
            memory_baseline.check(llm)
        """
    )
    result = project("--llm-update-baselines", preset=True)
    result.assert_outcomes(passed=5)
    assert "DeepSpeed put in: LinearAllreduce, LinearLayer" in result.stdout.str()
    # Recording has loaded twice, and what must be exact was.
    (recorded,) = pytester.path.glob("baselines/*/*/*.json")
    assert recorded.name == "tp_plan-x2.json"
    assert '"shard.1.logical": 8133888' in recorded.read_text()
    project("-k", "test_gate", preset=True).assert_outcomes(passed=1, deselected=4)


def test_a_tied_head_that_is_split_without_its_embedding(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    """DeepSpeed splits the head by its inputs and keeps the embedding whole: they cannot share their storage."""
    folder = pytester.path / "tied"
    folder.mkdir()
    config = config_of("random:tiny-llama") | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.strategy("deepspeed", "tp_plan")
        def test_tied(llm): pass
        """
    )
    result = project(f"--llm-model=tied=random:{folder}", "-k", "tied-deepspeed or tied-tp_plan")
    result.assert_outcomes(passed=2, deselected=2)
    result.stdout.fnmatch_lines(["*lm_head.weight is split and model.embed_tokens.weight is not, so that*"])


def test_heads_that_do_not_divide_are_the_cause_that_is_named(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    """transformers splits the weights of one key and value head over two ranks, and then cannot reshape them."""
    folder = pytester.path / "one_head"
    folder.mkdir()
    config = config_of("random:tiny-llama") | {"num_key_value_heads": 1}
    (folder / "config.json").write_text(json.dumps(config))
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.strategy("tp_plan")
        def test_one(llm): pass
        """
    )
    result = project(f"--llm-model=one_head=random:{folder}", "-k", "one_head")
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.fnmatch_lines(
        ["*the model does not run: RuntimeError:*", "*num_key_value_heads is 1, which does not divide by world_size=2"]
    )


def test_what_is_planted_in_a_rank_is_named_and_the_next_load_runs(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    from bitsandbytes.functional import has_avx512bf16

    pytester.makepyfile(
        planted=PLANTED,
        conftest=CONFTEST,
        test_it="""
        import os, signal
        import pytest
        from pytest_llmload import LoadCrashed

        @pytest.mark.strategy("killed", "exits", "raises", "whole", "copied", "apart")
        def test_planted(llm): pass
        @pytest.mark.strategy("hangs")
        def test_hangs(llm): pass
        @pytest.mark.strategy("deepspeed", world_size=1)
        def test_one_rank(llm): pass
        @pytest.mark.strategy("tp_plan")
        @pytest.mark.quant("nf4")
        def test_quantised(llm): pass

        def plant(model, tokenizer):
            if os.environ["RANK"] == "1":
                model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGSEGV))
        @pytest.mark.strategy("tp_plan")
        def test_dies_while_generating(llm):
            llm.run(plant)
            with pytest.raises(LoadCrashed, match="rank 1 was killed by SIGSEGV in phase 'generate'"):
                llm.generate("Hello")
        @pytest.mark.strategy("tp_plan")
        def test_is_loaded_anew(llm):
            assert len(llm.generate("Hello", max_new_tokens=4).tokens) == 4
        """,
    )
    # The time has to last until the ranks load: how long they take to start is the machine's.
    for seconds in (3, 9, 27, 81):
        hanging = project("-k", "hangs", f"--llm-timeout={seconds}s", preset=True)
        if "in plant" in hanging.stdout.str():
            break
    hanging.assert_outcomes(failed=1, deselected=10)
    result = project("-k", "not hangs", preset=True)
    result.assert_outcomes(failed=8, passed=2, deselected=1)
    text = hanging.stdout.str() + result.stdout.str()
    # For a CPU that computes in bfloat16, bitsandbytes packs a weight anew (nn/modules.py, ``Linear4bit.forward``).
    unquantised = "AttributeError" if has_avx512bf16() else "ValueError: quant_state is required"
    for piece in (
        "the load's process died: tiny-llama / killed-x2",
        "rank 1 was killed by SIGKILL in phase 'load'",
        "rank 1: about to be killed",
        "the load's process died: tiny-llama / exits-x2",
        "rank 1 exited with status 7 in phase 'load'",
        "the load failed: tiny-llama / raises-x2",
        "KeyError: rank 1: 'no such layer' (rank 0 still waited for it after 3 s, killed)",
        "the load timed out: tiny-llama / hangs-x2",
        f"still in phase 'load' after {seconds} s",
        "rank 1 is in phase 'load'",
        "in plant",
        "whole-x2 was not applied: tiny-llama / whole-x2",
        "rank 0 holds the whole model (15.51 MiB): none of",
        "rank 1 holds the whole model (15.51 MiB): none of",
        "copied-x2 was not applied: tiny-llama / copied-x2",
        "of rank 1's 30 tensors are those of rank 0",
        "apart-x2 was not applied: tiny-llama / apart-x2",
        "not the whole model's output",
        "init_inference changed nothing: it replaced none of the model's modules",
        "nothing was quantised to nf4",
        f"the model does not run: {unquantised}",
    ):
        assert piece in text, piece


def test_no_rank_listens_to_other_machines(pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]) -> None:
    """Nor does the process that starts them: while they meet, load and compute together."""
    pytester.makepyfile(
        """
        import os
        import pytest

        def listening(model, tokenizer):
            import torch
            family = []
            for pid in filter(str.isdecimal, os.listdir("/proc")):
                try:
                    if os.getsid(int(pid)) == os.getsid(0):
                        family.append(pid)
                except ProcessLookupError:
                    continue
            assert len(family) >= 3, "the two ranks and the process that started them"
            held = set()
            for pid in family:
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    try:
                        held.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
                    except FileNotFoundError:
                        continue
            found = []
            for table in ("tcp", "tcp6"):
                for line in open(f"/proc/self/net/{table}").read().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == "0A" and f"socket:[{fields[9]}]" in held:
                        found.append(fields[1].split(":")[0])
            return sorted(set(found))

        @pytest.mark.strategy("tp_plan", "deepspeed")
        def test_listening(llm):
            # As the kernel writes 127.0.0.1, on which gloo connects its pairs.
            assert set(llm.run(listening)) == {"0100007F"}
            assert len(llm.generate("Hello", max_new_tokens=2).tokens) == 2
        """
    )
    project().assert_outcomes(passed=2)


def test_the_suite_leaves_out_what_needs_more_devices_and_says_so(project: Callable[..., pytest.RunResult]) -> None:
    result = project("--pyargs", "pytest_llmload.suite", "-k", "test_generates and bf16")
    result.assert_outcomes(passed=1)
    for name in ("tensor_parallel", "tp_plan", "deepspeed"):
        line = f"not loaded by the suite: {name}, on a CPU run only if --llm-strategy={name} requests it"
        assert line in result.stdout.str()


def test_ranks_need_processes_of_their_own(pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]) -> None:
    pytester.makepyfile(
        """
        import pytest
        from pytest_llmload import LoadFailed
        @pytest.mark.strategy("tp_plan")
        def test_a(llm): pass
        def test_b(llm_load):
            with pytest.raises(LoadFailed, match="tp_plan-x4"):
                llm_load(strategy="tp_plan", world_size=4)
        """
    )
    result = project("--llm-isolation=inline")
    result.assert_outcomes(failed=1, passed=1)
    assert "strategy 'tp_plan' needs processes of its own: not under inline isolation" in result.stdout.str()


def test_no_rank_outlives_pytest(pytester: pytest.Pytester, checkpoint_cache: Path, warm_template: Template) -> None:
    pytester.makepyfile(
        planted="""
        import os, threading
        from pytest_llmload.strategies.tp_plan import TpPlan
        class Waits(TpPlan):
            name, fields = "waits", {"strategy": "waits", "world_size": 2}
            def load(self, job, kwargs):
                if os.environ["RANK"] == "1":
                    open("started", "w").close()
                threading.Event().wait()
        """,
        conftest="""
        import planted
        def pytest_llmload_strategies(config): return {"waits": "planted:Waits"}
        """,
        test_it="""
        import pytest
        @pytest.mark.strategy("waits")
        def test_a(llm): pass
        """,
    )

    def check(family: set[int]) -> None:
        assert len(family) >= 4, "server, load and two ranks"

    assert_nothing_outlives(pytester, checkpoint_cache, signal.SIGKILL, check, template=warm_template)
