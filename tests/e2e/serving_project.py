"""A project whose own loader is gated, for the tests of what happens in CI."""

SERVING = """
import transformers


def load_model(spec):
    return transformers.AutoModelForCausalLM.from_pretrained(spec.model, dtype="{dtype}")
"""
TESTS = """
import pytest


@pytest.mark.strategy("loader", target="serving:load_model")
def test_production(llm, memory_baseline):
    memory_baseline.check(llm, metrics=["host.weights", "weights.logical", "manifest"])
"""
