import pytest

pytestmark = pytest.mark.workload("2x256+16")  # batch x prompt + new tokens: memory at *your* context


@pytest.mark.quant("none", "int8", pytest.param("nf4", marks=pytest.mark.memory_ceiling(gpu="9GiB")))
def test_memory(llm, memory_baseline):  # one load each, shared with the tests below
    memory_baseline.check(llm)  # baselines/<model>/<device>/<variant>.json


@pytest.mark.quant("nf4", double_quant=True, compute_dtype="bf16")
@pytest.mark.latency_budget(load="30s", ttft="2s", per_token="250ms")
def test_speed(llm): ...


@pytest.mark.strategy("loader", target="ourapp.serving:load_model")  # production's own loader
@pytest.mark.quant("int8")  # what must hold on what it returns
def test_production(llm, memory_baseline):
    memory_baseline.check(llm)
    assert len(llm.generate("Hello", max_new_tokens=8).tokens) == 8
