"""The tensors that a process holds of a model which is split over several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Piece:
    """One tensor of a shard."""

    #: Its name in the whole model.
    name: str
    rank: int
    #: Its shape in the whole model.
    whole: tuple[int, ...]
    #: Whether the plan gives each rank a part of it; None where the library decides by itself.
    planned: bool | None = None
    #: Whether its values are the whole model's divided by the number of ranks: a bias that every rank adds.
    divided: bool = False


@dataclass(frozen=True)
class Shards:
    """What a load that is split over ``world_size`` ranks holds in this process."""

    world_size: int
    #: The ranks whose shards live here: all of them, or this process's one.
    ranks: tuple[int, ...]
    #: Path of a tensor in the loaded model -> what it is.
    pieces: Mapping[str, Piece] = field(default_factory=dict)
    #: Bytes by elements of the model if it were not sharded; 0: the tensors say it themselves.
    whole_bytes: int = 0

    def rank_of(self, path: str) -> int:
        """Return the rank that a tensor belongs to; several shards in one process are modules ``rank0``, ``rank1`` …"""
        return self.ranks[0] if len(self.ranks) == 1 else int(path.partition(".")[0].removeprefix("rank"))
