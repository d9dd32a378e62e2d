"""The tensor_parallel package's Config for a model, from the plan that transformers keeps for its architecture.

The package's own configs are for modules of 2023. transformers says of each module whether its weight is split by
columns or by rows; that is all that the package has to know, since attention modules infer their number of heads from
what they are given.
"""

from __future__ import annotations

import re
from typing import Any

import transformers
from tensor_parallel.config import Config
from tensor_parallel.state_actions import Scale, Split, SplitInGroupedChunks

from pytest_llmload.worker.parallel.shard_plan import ShardPlan, regex, uneven_heads

_GATHERED = ("colwise_gather_output", "colwise_rep")
#: The input is whole on each rank: transformers 4's name, and 5's.
_SPLIT_INPUT = ("rowwise_rep", "rowwise_split_input")
_EMBEDDINGS = ("embedding_rowwise", "embedding_colwise")
#: Modules whose output is a part of a sum although their weights are named one by one.
_SUMMED = ("moe_tp_experts", "all_reduce", "gather")
_WHOLE = ("replicate", "replicated_with_grad_allreduce")


def model_plan(model: Any) -> ShardPlan:
    """Return the plan of a model that is not sharded yet.

    Raises ValueError, in one sentence, where transformers keeps none.
    """
    styles = getattr(model, "_tp_plan", None)
    if not styles:
        raise ValueError(
            f"transformers {transformers.__version__} keeps no tensor-parallel plan (tp_plan) for "
            f"{type(model).__name__} (model type {model.config.model_type!r}): nothing says how to shard it"
        )
    return ShardPlan(styles)


def package_config(model: Any, world_size: int) -> tuple[Config, ShardPlan]:
    """Return the Config, and the plan that it carries out.

    The input embedding is split too where the plan does not name it; embeddings are split along the hidden dimension,
    since the package has no lookup in a part of the vocabulary. Raises ValueError where the architecture has no plan,
    where a style of the plan has no counterpart, or where heads do not divide by ``world_size``.
    """
    plan = model_plan(model)
    if why := uneven_heads(model, world_size):
        raise ValueError(why)
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    styles = dict(plan.styles)
    if plan.style(f"{names[id(embedding)]}.weight") is None:
        styles[names[id(embedding)]] = "embedding_colwise"
    if head is not None and head.weight is embedding.weight:
        # One tensor is split in one way only: a tied head takes its part of the hidden state.
        styles[names[id(head)]] = "rowwise_split_input"
    rules = _Rules(world_size, {name for name, _ in model.named_parameters()})
    for name, style in styles.items():
        rules.add(name, style)
    return Config(rules.state, rules.inputs, rules.outputs, {}), ShardPlan(styles)


class _Rules:
    """The package's rules: patterns of names, and what to do with state, inputs and outputs."""

    def __init__(self, world_size: int, parameters: set[str]) -> None:
        self.world_size = world_size
        self.parameters = parameters
        self.state: dict[str, Any] = {}
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def add(self, name: str, style: str) -> None:
        """Add the rules for one entry of a plan.

        Raises ValueError for a style that the package cannot carry out.
        """
        own = re.compile(regex(name))
        if any(own.fullmatch(parameter) for parameter in self.parameters):
            self._parameter(name, style)
        elif style in ("colwise", "local_colwise", *_GATHERED):
            self._split(name, 0, 0)
            if style in _GATHERED:
                self.outputs[f"^{own.pattern}$"] = {0: "gather -1"}
        elif style in ("rowwise", "local_rowwise", *_SPLIT_INPUT):
            self._split(name, 1, None)
            self.outputs[f"^{own.pattern}$"] = {0: "sum"}
            if style in _SPLIT_INPUT:
                self.inputs[f"^{own.pattern}$"] = {0: "split -1"}
        elif style in _EMBEDDINGS:
            self._split(name, 1, None)
            self.outputs[f"^{own.pattern}$"] = {0: "gather -1"}
        elif style in _SUMMED:
            self.outputs[f"^{own.pattern}$"] = {0: "sum"}
        elif style not in _WHOLE:
            raise ValueError(f"the tensor_parallel package has no counterpart of style {style!r}, planned for {name}")

    def _split(self, name: str, weight: int, bias: int | None) -> None:
        module = regex(name)
        self.state[rf"^{module}\.weight$"] = Split(self.world_size, weight)
        # Each rank adds its bias before the sum over the ranks: a part of it, or so much of the whole.
        self.state[rf"^{module}\.bias$"] = Scale(self.world_size) if bias is None else Split(self.world_size, bias)
        for leaf in ("weight", "bias"):
            pattern = rf"^{module}\.{leaf}$"
            if not any(re.match(pattern, parameter) for parameter in self.parameters):
                del self.state[pattern]

    def _parameter(self, name: str, style: str) -> None:
        """Add the rule for a fused weight that is a parameter of its own: experts x out x in."""
        actions = {
            "colwise": Split(self.world_size, -2),
            "rowwise": Split(self.world_size, -1),
            "packed_colwise": SplitInGroupedChunks(self.world_size, dim=1, num_groups=2, chunk_size=1),
            "packed_rowwise": SplitInGroupedChunks(self.world_size, dim=2, num_groups=2, chunk_size=1),
        }
        if style not in actions:
            raise ValueError(f"the tensor_parallel package has no counterpart of style {style!r}, planned for {name}")
        self.state[f"^{regex(name)}$"] = actions[style]
