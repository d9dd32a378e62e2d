"""What a team keeps in its repository: its model, loaded the way production loads it, against baselines in git."""

import pytest


@pytest.mark.quant("none", "int8", "nf4")
def test_memory(llm, memory_baseline):
    memory_baseline.check(llm)


@pytest.mark.quant("nf4", double_quant=True)
@pytest.mark.memory_ceiling(host="2GiB")
@pytest.mark.latency_budget(load="60s")
def test_double_quant(llm, memory_baseline):
    memory_baseline.check(llm)
    assert len(llm.generate("Hello", max_new_tokens=8).tokens) == 8
