"""How a plan splits the tensors of a model over ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

#: Styles of transformers' plans that give each rank a part of a module's weight (transformers 5:
#: distributed/tensor_parallel.py; 4: integrations/tensor_parallel.py). All others leave it whole.
SHARDING = frozenset(
    {
        "colwise",
        "colwise_rep",
        "colwise_gather_output",
        "rowwise",
        "rowwise_rep",
        "rowwise_split_input",
        "packed_colwise",
        "packed_rowwise",
        "local_colwise",
        "local_rowwise",
        "local_packed_rowwise",
        "embedding_rowwise",
        "embedding_colwise",
    }
)
#: Of these the bias is added after the sum over the ranks, so that each keeps it whole.
ROWWISE = frozenset({"rowwise", "rowwise_rep", "rowwise_split_input", "local_rowwise"})


class ShardPlan:
    """transformers' plan of a model: patterns of modules and parameters, and the style of each."""

    def __init__(self, styles: Mapping[str, str]) -> None:
        self.styles = dict(styles)
        self._patterns = [(re.compile(regex(name)), style) for name, style in self.styles.items()]

    def style(self, parameter: str) -> str | None:
        """Return the style that names a parameter itself, else the one that names its module; None where none does."""
        for name in (parameter, parameter.rpartition(".")[0]):
            for pattern, style in self._patterns:
                if pattern.fullmatch(name):
                    return style
        return None

    def summed(self, parameter: str) -> bool:
        """Return whether a parameter is a bias of which the sum over the ranks must contain one."""
        return parameter.endswith(".bias") and self.style(parameter) in ROWWISE

    def shards(self, parameter: str) -> bool:
        """Return whether the plan gives each rank a part of a parameter."""
        return self.style(parameter) in SHARDING and not self.summed(parameter)


def uneven_heads(model: Any, world_size: int) -> str:
    """Return which number of heads does not divide by the number of ranks; empty if all do."""
    config = model.config.get_text_config()
    for field in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, field, None)
        if isinstance(count, int) and count % world_size:
            return f"{field} is {count}, which does not divide by world_size={world_size}"
    return ""


def regex(name: str) -> str:
    """Return ``layers.*.mlp`` as a regular expression: a star is one number."""
    return re.escape(name).replace(r"\*", r"\d+")


def starts(size: int, world_size: int, rank: int) -> Iterator[tuple[int, int]]:
    """Yield where a rank's part of ``size`` rows may begin and end.

    Parts are even, or equal chunks and a shorter last one. Both are the same where ``size`` divides by ``world_size``.
    """
    even, extra = divmod(size, world_size)
    begin = rank * even + min(rank, extra)
    yield begin, begin + even + (rank < extra)
    chunk = -(-size // world_size)
    yield min(rank * chunk, size), min((rank + 1) * chunk, size)


def rows(size: int, held: int, world_size: int, rank: int) -> Iterator[list[int]]:
    """Yield which rows of the whole a rank's ``held`` rows may be.

    They are one run of them, or one of each of two packed halves.
    """
    seen: list[list[int]] = []
    for begin, end in starts(size, world_size, rank):
        seen.append(list(range(begin, end)))
    if size % 2 == 0:
        for begin, end in starts(size // 2, world_size, rank):
            seen.append([*range(begin, end), *range(size // 2 + begin, size // 2 + end)])
    yield from (found for index, found in enumerate(seen) if len(found) == held and found not in seen[:index])


def divided_axis(held: Iterable[int], whole: Iterable[int]) -> int | None:
    """Return the one axis along which a tensor is smaller than in the whole model; None where it is as large.

    ValueError where it differs along several.
    """
    held, whole = tuple(held), tuple(whole)
    if len(held) != len(whole):
        raise ValueError(f"shape {list(held)} is no part of {list(whole)}")
    axes = [axis for axis, (part, size) in enumerate(zip(held, whole, strict=True)) if part != size]
    if len(axes) > 1:
        raise ValueError(f"shape {list(held)} is no part of {list(whole)}")
    return axes[0] if axes else None
