"""Markers: which loads a test gets, what they are called, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.host.markers.load import AttnMarker


def collected(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if "::" in line and not line.startswith(("ERROR", "="))]


def test_ids_read_well_and_equal_specs_are_one_load(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.quant("none", "nf4")
        def test_quant(llm): pass
        @pytest.mark.strategy("nf4", "bf16")
        def test_strategy(llm): pass
        @pytest.mark.quant("nf4", double_quant=True, compute_dtype="bf16")
        def test_options(llm): pass
        @pytest.mark.quant("nf4")
        @pytest.mark.quant("nf4", double_quant=True)
        def test_twice(llm): pass
        @pytest.mark.dtype("fp32")
        @pytest.mark.attn("eager", )
        @pytest.mark.workload("2x8+4")
        def test_more(llm): pass
        @pytest.mark.device_map("auto")
        def test_map(llm): pass
        @pytest.mark.strategy("tensor_parallel", "tp_plan", "deepspeed")
        def test_ranks(llm): pass
        @pytest.mark.strategy("tensor_parallel", world_size=4)
        def test_four(llm): pass
        @pytest.mark.parametrize("x", [1, 2])
        @pytest.mark.quant("int8")
        def test_user(llm, x): pass
        four = pytest.param("nf4", id="four", marks=pytest.mark.xfail)
        two = pytest.param("int8", marks=pytest.mark.gpu_count(2))
        @pytest.mark.quant(four, two)
        def test_param(llm): pass
        @pytest.mark.workload(pytest.param("1x16+2", id="small"))
        @pytest.mark.gpu_count(n=pytest.param(2, marks=pytest.mark.xfail))
        def test_single(llm): pass
        @pytest.mark.quant("nf4", skip_modules=["b", "a"])
        @pytest.mark.quant("nf4", skip_modules=["a", "b"])
        def test_order(llm): pass
        """
    )
    names = [line.split("::")[1] for line in collected(project("--collect-only", "-q"))]
    assert sorted(names) == sorted(
        [
            "test_quant[tiny-llama-none]",
            "test_quant[tiny-llama-nf4]",
            "test_strategy[tiny-llama-nf4]",
            "test_strategy[tiny-llama-bf16]",
            "test_options[tiny-llama-nf4-dq-bf16]",
            "test_twice[tiny-llama-nf4]",
            "test_twice[tiny-llama-nf4-dq]",
            "test_more[tiny-llama-fp32+eager+w2x8-4]",
            "test_map[tiny-llama-auto]",
            "test_ranks[tiny-llama-tensor_parallel-x2]",
            "test_ranks[tiny-llama-tp_plan-x2]",
            "test_ranks[tiny-llama-deepspeed-x2]",
            "test_four[tiny-llama-tensor_parallel-x4]",
            "test_user[tiny-llama-int8-1]",
            "test_user[tiny-llama-int8-2]",
            "test_param[tiny-llama-four]",
            "test_param[tiny-llama-int8-x2]",
            "test_single[tiny-llama-x2-small]",
            f"test_order[tiny-llama-{LoadSpec(model='m', name='m', quant='nf4', skip_modules=('a', 'b')).slug}]",
        ]
    )


def test_variants_are_told_apart_by_what_they_load(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.quant(pytest.param("nf4", id="four"))
        @pytest.mark.dtype("fp16", "bf16")
        def test_product(llm): pass
        @pytest.mark.quant("none", "nf4")
        @pytest.mark.dtype(pytest.param("fp16", id="half"))
        @pytest.mark.attn("eager")
        def test_places(llm): pass
        @pytest.mark.quant(pytest.param("nf4", id="x"), pytest.param("int8", id="x"))
        def test_same_id(llm): pass
        @pytest.mark.quant("nf4", dense_ok=["a"])
        @pytest.mark.quant("nf4", dense_ok=["b"])
        def test_checks(llm): pass
        @pytest.mark.quant("fp4", pytest.param("fp4", marks=pytest.mark.xfail), "fp4")
        def test_marks(llm): pass
        """
    )
    # Under strict ids pytest refuses any two that are the same.
    pytester.makeini("[pytest]\nstrict_parametrization_ids = true\n")
    names = [line.split("::")[1] for line in collected(project("--collect-only", "-q"))]
    told_apart = re.compile(r"\+[0-9a-f]{6}\]")
    assert sorted(told_apart.sub("+DIGITS]", name) for name in names) == sorted(
        [
            "test_product[tiny-llama-four-fp16]",
            "test_product[tiny-llama-four-bf16]",
            "test_places[tiny-llama-half+eager]",
            "test_places[tiny-llama-nf4-half+eager]",
            "test_same_id[tiny-llama-x]",
            "test_same_id[tiny-llama-x+DIGITS]",
            "test_checks[tiny-llama-nf4]",
            "test_checks[tiny-llama-nf4+DIGITS]",
            "test_marks[tiny-llama-fp4]",
            "test_marks[tiny-llama-fp4+2]",
        ]
    )


def test_the_nearest_node_wins_and_different_markers_multiply(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        import pytest
        pytestmark = pytest.mark.quant("nf4")
        def test_module(llm): pass
        @pytest.mark.quant("int8")
        class TestC:
            def test_class(self, llm): pass
            @pytest.mark.quant("none")
            def test_function(self, llm): pass
        class TestLower(TestC):
            pass
        @pytest.mark.quant("fp4")
        @pytest.mark.quant("fp4", double_quant=True)
        class TestLowest(TestLower):
            pass
        @pytest.mark.dtype("fp16", "bf16")
        @pytest.mark.attn("eager")
        @pytest.mark.attn("sdpa")
        def test_product(llm): pass
        """
    )
    names = [line.split("::")[-1] for line in collected(project("--collect-only", "-q"))]
    assert sorted(names) == sorted(
        [
            "test_module[tiny-llama-nf4]",
            "test_class[tiny-llama-int8]",
            "test_function[tiny-llama-none]",
            "test_class[tiny-llama-int8]",
            "test_function[tiny-llama-none]",
            "test_class[tiny-llama-fp4]",
            "test_class[tiny-llama-fp4-dq]",
            "test_function[tiny-llama-none]",
            *(
                f"test_product[tiny-llama-nf4+{dtype}+{attn}]"
                for dtype in ("fp16", "bf16")
                for attn in ("eager", "sdpa")
            ),
        ]
    )


WRONG = [
    ("strategy('bf16', world_size=2)", "strategy('bf16') has no world_size: it is not split over ranks"),
    ("strategy('tp_plan', world_size='2')", "world_size='2'; write a whole number of shards or ranks, at least 1"),
    ('quant("nf5")', "quant: unknown 'nf5'; use one of none, int8, nf4, fp4"),
    ("quant()", "quant names nothing"),
    ('quant("nf4", double=True)', "quant: got an unexpected keyword argument 'double'"),
    ('quant("int8", double_quant=True)', "quant('int8') has no option double_quant"),
    ('quant("nf4", compute_dtype="half")', "unknown compute_dtype 'half'"),
    ('quant("nf4", skip_modules="lm_head")', "'lm_head' is not a list of names"),
    ("gpu_count(0)", "gpu_count(0): write a whole number of GPUs, at least 1"),
    ('gpu_count("ALL")', "gpu_count('ALL')"),
    ('gpu_memory("40")', "gpu_memory: write one size"),
    ('memory_ceiling(gpu="8.5Gib")', "memory_ceiling: '8.5Gib' is not a size: write a number and one of B, KiB"),
    ('memory_ceiling(gpu="1GiB", phase="idle")', "unknown phase 'idle'"),
    ('latency_budget(load="fast")', "latency_budget: 'fast' is not a time"),
    ('strategy("nf4")\n@pytest.mark.quant("int8")', "contradicting markers: quant is"),
    ('strategy("loader")', "needs target='pkg.mod:function'"),
    ('strategy("speculative")', "strategy: unknown 'speculative'"),
    ('device_map("auto", max_memory={"gpu": "1GiB"})', "'gpu' is not a device"),
    ('device_map("auto", max_memory={0: "1 gig"})', "max_memory: '1 gig' is not a size"),
    ('device_map("autoo")', "'autoo' is neither a device nor one of"),
    ('device_map("autoo")', "; did you mean 'auto'?"),
    ('attn("eagr")', "attn: unknown 'eagr'; did you mean 'eager'?"),
    ('attn("flash")', "attn: unknown 'flash'; use one of eager, sdpa, flex_attention, flash_attention_2, flash_att"),
    ('attn("flash-2")', "attn: unknown 'flash-2'; use one of eager, sdpa"),
    ('workload("many")', "workload: 'many' is not a workload"),
    ('quant("nf4", double_quant="no")', "quant: double_quant='no' is not a boolean; write True or False"),
    ('strategy("nf4", double_quant="no")', "strategy: double_quant='no' is not a boolean; write True or False"),
    ('strategy("nf4", compute_dtype="half")', "strategy: unknown compute_dtype 'half'; use one of fp32, fp16, bf16"),
    ('lora(merged="no")', "lora: merged='no' is not a boolean; write True or False"),
    ('strategy("fp16", double_quant=True)', "double_quant has no effect on 'fp16'; it belongs to quant('nf4', 'fp4'"),
    ('strategy("int8", compute_dtype="bf16")', "compute_dtype has no effect on 'int8'; it belongs to quant("),
    ('strategy("fp16", skip_modules=["a"])', "skip_modules has no effect on 'fp16'; it belongs to quant("),
    ('strategy("auto", target="a:b")', "strategy('auto') has no target: it calls no function of yours"),
    ('strategy("tensor_parallel")\n@pytest.mark.quant("nf4")', "package splits dense weights only"),
    ('strategy("deepspeed")\n@pytest.mark.quant("int8")', "init_inference splits dense weights only"),
    ('strategy("deepspeed", kernel_inject="no")', "kernel_inject='no' is not a boolean; write True or False"),
    ('strategy("auto", hook=print)', "cannot go to the load's process"),
    ('strategy("auto")\n@pytest.mark.device_map({"": "disk"})', "strategy('auto') would ignore device_map"),
    ('strategy("max_memory")\n@pytest.mark.device_map({"": 0})', "strategy('max_memory') would ignore device_map"),
    ('strategy("fp16", max_memory={0: "1GiB"})', "a load on one device would ignore max_memory: use"),
    ('device_map({"": 0}, max_memory={0: "1GiB"})', "a map of modules would ignore max_memory"),
    (
        'strategy("tp_plan", max_memory={0: "1GiB"})\n@pytest.mark.device_map({"": 0})',
        "strategy('tp_plan') would ignore device_map and max_memory",
    ),
    ('strategy("deepspeed")\n@pytest.mark.device_map({"": 0})', "strategy('deepspeed') would ignore device_map"),
    (
        'strategy("tensor_parallel")\n@pytest.mark.device_map({"": 0})',
        "strategy('tensor_parallel') would ignore device_map",
    ),
    (
        'strategy("tensor_parallel", world_size=4)\n@pytest.mark.gpu_count(2)',
        "gpu_count(2) contradicts world_size=4 of strategy('tensor_parallel')",
    ),
    ('strategy("tp_plan")\n@pytest.mark.gpu_count(4)', "gpu_count(4) contradicts world_size=2"),
    ('quant("int8", "none", double_quant=True)', "quant('int8', 'none') has no option double_quant"),
    ('quant("none", skip_modules=["a"])', "quant('none') has no option skip_modules"),
    ('strategy("nf4", compute_dtype="bf17")', "strategy: unknown compute_dtype 'bf17'"),
    ('strategy("fp16", dtype="bfloat16")', "dtype='bfloat16' contradicts dtype 'fp16'"),
    (
        'attn("eager")\n@pytest.mark.strategy("auto", attn_implementation="sdpa")',
        "attn_implementation='sdpa' contradicts attn 'eager'",
    ),
    (
        'quant(pytest.param("nf4", "int8"))',
        "quant: pytest.param('nf4', 'int8') has 2 values; give each pytest.param one",
    ),
    ("gpu_count(pytest.param(1, 2))", "gpu_count: pytest.param(1, 2) has 2 values; give each pytest.param one"),
    ('quant("nf4", double=True)', "write quant(*schemes, double_quant=False, compute_dtype=None, skip_modules=()"),
    ('strategy("loader", target="nocolon")', "needs target='pkg.mod:function'"),
    # Options of from_pretrained that choose files, with what to write instead.
    ('strategy("single", subfolder="v1")', "subfolder= would load different files from those that are compared: name"),
    ('strategy("single", revision="abc")', "name it in the model: --llm-model=org/model@REVISION"),
    ('strategy("single", variant="fp16")', "under their plain names, model.safetensors"),
    ('strategy("single", gguf_file="a.gguf")', "name that file as the model: --llm-model=path/to/FILE.gguf"),
    ('strategy("single", use_safetensors=False)', "give a folder that has only the files to load"),
    ('strategy("single", config="other")', "config= would load different files from those that are compared: give a"),
    ('strategy("single", code_revision="abc")', "load it in a loader of your own: strategy('loader', target='module:"),
    ('strategy("loader", target="ourap.serving:load")', "target='ourap.serving:load': there is no module 'ourap'"),
    ('strategy("loader", target="ourapp.servin:load")', "there is no module 'ourapp.servin'"),
    (
        'strategy("loader", target="ourapp.serving:lod")',
        "serving.py has no 'lod'; did you mean ourapp.serving:load?",
    ),
    ('quant(config="ourapp.serving:lod")', "quant: config='ourapp.serving:lod': serving.py has no 'lod'"),
    (
        'auto_class("AutoModelForCausalLMM")',
        "auto_class: the installed transformers has no 'AutoModelForCausalLMM'; did you mean 'AutoModelForCausalLM'?",
    ),
]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What one run says of all wrong markers, each in a file of its own."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "ourapp").mkdir()
    (folder / "ourapp" / "serving.py").write_text(
        "raise ImportError('it is read, not imported')\ndef load(spec): ...\n"
    )
    for number, (marker, _) in enumerate(WRONG):
        text = f"import pytest\n@pytest.mark.{marker}\ndef test_a(llm): pass\n"
        (folder / f"test_{number}.py").write_text(text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--llm-model=random:tiny-llama",
        "--llm-device=cpu",
        "--collect-only",
        "-p",
        "no:randomly",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr.splitlines()


@pytest.mark.parametrize(("marker", "message"), WRONG)
def test_a_wrong_marker_is_one_sentence_that_names_the_test(refused: list[str], marker: str, message: str) -> None:
    number = WRONG.index((marker, message))
    (line,) = [line for line in refused if f"test_{number}.py::test_a" in line]
    assert message in line


def test_a_marker_that_would_be_ignored_is_an_error(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.parametrize("x", [pytest.param("a", marks=pytest.mark.quant("nf4"))])
        def test_inside_param(llm, x): pass
        @pytest.mark.quant("nf4")
        def test_no_fixture(): pass
        @pytest.mark.lora
        @pytest.mark.gpu_count("ALL")
        @pytest.mark.gpu_memory("large")
        @pytest.mark.latency_budget
        @pytest.mark.memory_ceiling("8GiB")
        @pytest.mark.strategy("greedy")
        @pytest.mark.lora("v1")
        @pytest.mark.workload("heavy")
        @pytest.mark.device_map("eu")
        @pytest.mark.attn("causal")
        @pytest.mark.auto_class("A")
        @pytest.mark.dtype("int64")
        def test_label(): pass
        @pytest.mark.strategy("nf4")
        @pytest.mark.lora("org/adapter")
        @pytest.mark.workload("1x8+2")
        @pytest.mark.device_map({"": "cpu"})
        @pytest.mark.attn("sdpa")
        @pytest.mark.auto_class("AutoModelForCausalLM")
        def test_meant(): pass
        @pytest.mark.memory_ceiling(host="1B")
        def test_ceiling(): pass
        @pytest.mark.latency_budget(load="1us")
        def test_budget(llm_spec): pass
        @pytest.mark.gpu_memory("40GiB")
        def test_hardware(): pass
        @pytest.mark.gpu_memory("40GiB")
        @pytest.mark.memory_ceiling(host="1B")
        @pytest.mark.latency_budget(load="1us")
        def test_factory(llm_load): pass
        @pytest.mark.gpu_count("ALL")
        def test_whole(llm_gpus): pass
        @pytest.mark.memory_ceiling(host="1B")
        class TestBoth:
            def test_loads(self, llm): pass
            def test_does_not(self): pass
        """
    )
    result = project()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    text = result.stderr.str()
    assert "test_whole: gpu_count('ALL'): write a whole number of GPUs" in text
    assert "quant inside pytest.param(marks=…) of another parametrize would be ignored" in text
    assert "test_no_fixture: quant would be ignored: the test uses no load fixture" in text
    assert "test_ceiling: memory_ceiling would be ignored: the test uses no load fixture; let it request 'llm'" in text
    assert "test_budget[tiny-llama-none]: latency_budget would be ignored" in text
    assert "test_hardware: gpu_memory would be ignored" in text
    for name in ("strategy", "lora", "workload", "device_map", "attn", "auto_class"):
        assert f"test_meant: {name} would be ignored" in text
    assert not [name for name in ("test_label", "test_factory", "TestBoth") if name in text]


def test_a_wrong_marker_is_said_once_by_a_run_in_several_workers(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.gpu_count(0)
        def test_a(llm): pass
        @pytest.mark.quant("nf4")
        def test_no_fixture(): pass
        def test_c(): pass
        """
    )
    result = project("-n", "2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    everything = result.stderr.str() + result.stdout.str()
    assert everything.count("gpu_count(0): write a whole number of GPUs, at least 1") == 1
    assert everything.count("quant would be ignored") == 1
    assert "INTERNALERROR" not in everything
    assert "Traceback" not in everything
    result.assert_outcomes()


def test_labels_in_other_suites_are_left_alone(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makeini("[pytest]\n")
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.lora
        def test_label(): pass
        @pytest.mark.gpu_count("ALL")
        @pytest.mark.quant
        def test_other(): pass
        @pytest.mark.quant("nf4")
        @pytest.mark.gpu_count(8)
        @pytest.mark.memory_ceiling(host="1B")
        def test_same_words(): pass
        @pytest.fixture
        def llm(): return "theirs"
        @pytest.mark.quant("q4_k_m")
        def test_own_fixture(llm): assert llm == "theirs"
        """
    )
    project("-m", "llmload", fast=False).assert_outcomes(deselected=4)
    project("--strict-markers", fast=False).assert_outcomes(passed=4)
    project("-m", "lora", fast=False).assert_outcomes(passed=1, deselected=3)


def test_every_test_that_loads_carries_the_marker(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile("def test_a(llm): pass\ndef test_b(llm_load): pass\ndef test_c(): pass")
    project("-m", "not llmload").assert_outcomes(passed=1, deselected=2)


def test_each_count_of_gpus_is_skipped_by_itself(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makeconftest(
        """
        from pytest_llmload.core.job import Device, Gpu
        from pytest_llmload.host.loads import hardware
        gpu = Gpu(uuid="GPU-0", name="one", total=8 << 30, capability=(9, 0))
        hardware.detect = lambda asked: Device("cuda", "one", (gpu,))
        """
    )
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.gpu_count(2)
        @pytest.mark.gpu_count(1)
        def test_variants(llm_spec): pass
        @pytest.mark.gpu_count(2)
        def test_gpus(llm_gpus): pass
        @pytest.mark.gpu_count(pytest.param(1))
        def test_enough(llm_gpus): assert len(llm_gpus) == 1
        @pytest.mark.gpu_memory("40GiB")
        def test_memory(llm_gpus): pass
        """
    )
    result = project("-rs")
    result.assert_outcomes(passed=2, skipped=3)
    result.stdout.fnmatch_lines(
        ["*needs 2 GPUs, this run sees 1*", "*needs GPUs of 40.00 GiB, this run's have 8.00 GiB*"]
    )
    project(fast=False).assert_outcomes(passed=1, skipped=3)


def test_the_runs_loader_is_for_tests_that_name_no_strategy(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.strategy("fp16", "nf4")
        def test_named(llm): pass
        @pytest.mark.quant("nf4")
        def test_held(llm): pass
        @pytest.mark.device_map("auto")
        def test_placed(llm): pass
        def test_plain(llm): pass
        """
    )
    names = [line.split("::")[1] for line in collected(project("--collect-only", "-q", "--llm-loader=app:load"))]
    assert sorted(names) == [
        "test_held[tiny-llama-loader-nf4+app.load]",
        "test_named[tiny-llama-fp16]",
        "test_named[tiny-llama-nf4]",
        "test_placed[tiny-llama-auto]",
        "test_plain[tiny-llama-loader+app.load]",
    ]


def test_the_factory_takes_what_strategy_takes(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(app="def load(spec): ...")
    pytester.makepyfile(
        """
        from pytest_llmload.host.settings.models import parse_model
        from pytest_llmload.host.run.stash import state_of
        def test_a(pytestconfig):
            state = state_of(pytestconfig)
            def spec(**keywords):
                return state.marks.spec(state.models[0], state.marks.from_keywords("here", **keywords), "here")
            loader = spec(strategy="loader", target="app:load")
            assert (loader.strategy, loader.target) == ("loader", "app:load")
            assert spec(target="app:load") == loader
            assert spec(strategy="tp_plan", world_size=4).world_size == 4
            assert spec(max_memory={0: "1GiB"}).max_memory == (("0", 1 << 30),)
        """
    )
    project().assert_outcomes(passed=1)


@pytest.mark.parametrize("name", ["flash_attention_4", "paged|eager", "kernels-community/flash-attn", "mla_of_mine"])
def test_an_attention_implementation_that_may_exist_is_accepted(name: str) -> None:
    unused: Any = None
    (value,) = AttnMarker(unused, unused).read((name,), {}, "test_a")
    assert value.fields == {"attn": name}
