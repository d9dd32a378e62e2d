"""A model made of the tensor_parallel package's shards that still generates: a cache for each rank, one generate."""

from __future__ import annotations

import functools
from copy import deepcopy
from typing import Any

import torch
from tensor_parallel import TensorParallel
from transformers import DynamicCache

from pytest_llmload.worker.model.shards import Piece, Shards
from pytest_llmload.worker.model.tensors import Inventory
from pytest_llmload.worker.parallel.package_config import package_config

#: What the package puts around a module whose inputs or outputs pass through a collective operation.
_WRAPPER = "tp_wrapped_module."


class RankCaches(DynamicCache):  # type: ignore[misc]
    """One key-value cache a rank, which a decoding loop handles as one."""

    def __init__(self, first: Any, world_size: int) -> None:
        """Keep ``first`` and copy it for each further rank; it must be empty still."""
        super().__init__()
        self.by_rank = [first, *(deepcopy(first) for _ in range(world_size - 1))]

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return int(self.by_rank[0].get_seq_length(*args, **kwargs))

    def __len__(self) -> int:
        return len(self.by_rank[0])

    def reorder_cache(self, beam_idx: Any) -> None:
        self._each("reorder_cache", beam_idx)

    def crop(self, max_length: int) -> None:
        self._each("crop", max_length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Any) -> None:
        self._each("batch_select_indices", indices)

    def reset(self) -> None:
        self._each("reset")

    def _each(self, name: str, *args: Any) -> None:
        for cache in self.by_rank:
            getattr(cache, name)(*args)


class _Sharded:
    """Mixed into the model's own class, so that whatever asks for that class or its attributes finds them.

    What is not here is rank 0's. The shards are ``rank0``, ``rank1`` …; ``parallel`` is the package's own module.
    """

    def __init__(self, parallel: Any, config: Any, generation_config: Any) -> None:
        torch.nn.Module.__init__(self)
        self.config = config
        self.generation_config = generation_config
        # Not as a submodule: the shards would have two paths.
        self.__dict__["parallel"] = parallel
        for rank, shard in enumerate(parallel.module_shards):
            self.add_module(f"rank{rank}", shard)
            shard.register_forward_pre_hook(functools.partial(_own_cache, rank), with_kwargs=True)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if name == "rank0":
                raise
            return getattr(self.rank0, name)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        caches = kwargs.get("past_key_values")
        if caches is None and kwargs.get("use_cache", self.config.use_cache):
            caches = RankCaches(DynamicCache(config=self.config), len(self.parallel.module_shards))
        elif caches is not None and not isinstance(caches, RankCaches):
            raise TypeError(
                f"a sharded model needs a cache for each rank (RankCaches), not one {type(caches).__name__}"
            )
        if caches is not None:
            kwargs["past_key_values"] = caches
        output = self.parallel(*args, **kwargs)
        if caches is not None and getattr(output, "past_key_values", None) is not None:
            output.past_key_values = caches
        return output

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)  # type: ignore[misc]
        cache = model_kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, RankCaches):
            model_kwargs["past_key_values"] = RankCaches(cache, len(self.parallel.module_shards))


def _own_cache(rank: int, shard: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    caches = kwargs.get("past_key_values")
    if isinstance(caches, RankCaches):
        kwargs = {**kwargs, "past_key_values": caches.by_rank[rank]}
    return args, kwargs


def shard(model: Any, devices: list[str]) -> tuple[Any, Shards]:
    """Return the model in shards, one on each device, and what each tensor of the shards is.

    Raises ValueError where the architecture cannot be sharded, see :func:`package_config`.
    """
    config, plan = package_config(model, len(devices))
    whole = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    whole_bytes = sum(held.nbytes for held in Inventory(model).distinct())
    # Not through torch.distributed, which other code may have initialised; nothing is stored in pieces that every
    # forward would have to gather again.
    parallel = TensorParallel(model, devices, tensor_parallel_config=config, distributed=False, sharded=False)
    cls = type(model)
    namespace = {"forward": _with_signature_of(cls.forward), "__module__": cls.__module__}
    sharded = type(cls.__name__, (_Sharded, cls), namespace)(parallel, model.config, model.generation_config)
    sharded.eval()
    pieces = {}
    for path in sharded.state_dict():
        rank, _, rest = path.partition(".")
        name = rest.replace(_WRAPPER, "")
        if name in whole:
            pieces[path] = Piece(
                name, int(rank.removeprefix("rank")), whole[name], planned=plan.shards(name), divided=plan.summed(name)
            )
    return sharded, Shards(len(devices), tuple(range(len(devices))), pieces, whole_bytes)


def _with_signature_of(original: Any) -> Any:
    """Return a ``forward`` with the signature of the original: generate() sees there which inputs a model takes."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    return forward
