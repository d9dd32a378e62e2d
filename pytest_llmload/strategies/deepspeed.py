"""DeepSpeed's inference engine: automatic tensor parallelism, or its own kernels."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.job import RANKS, Job
from pytest_llmload.core.results import Problem
from pytest_llmload.core.spec import AS_STORED
from pytest_llmload.strategies.base import Strategy, why_ignored

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.worker.model.loaded import Loaded

#: The option that requests DeepSpeed's own kernels instead of the model's own modules.
KERNELS = "kernel_inject"


#: Modules that init_inference imports on its first call; their location differs between versions.
_LATE = ("deepspeed.module_inject.auto_ep_layer", "transformers.models.gpt2.modeling_gpt2")
#: Modules that compile the kernels, or find them compiled.
_COMPILER = ("torch.utils.cpp_extension",)


class DeepSpeed(Strategy):
    """``deepspeed.init_inference`` over ``world_size`` processes, each of which first reads the whole model.

    ``kernel_inject=True`` sets ``replace_with_kernel_inject``: on GPUs only, for the architectures that DeepSpeed has
    kernels for. The engine's module is measured and checked.
    """

    name = "deepspeed"
    summary = "deepspeed.init_inference: automatic tensor parallel over world_size processes, or kernel injection."
    fields: ClassVar[dict[str, Any]] = {"strategy": "deepspeed", "world_size": 2}
    options: ClassVar[tuple[str, ...]] = (KERNELS,)
    packages = (*Strategy.packages, "deepspeed")
    #: Its import initialises the accelerator.
    cold_packages = ("deepspeed",)
    runs_in = RANKS
    same_output = True

    @classmethod
    def refuses(cls, spec: LoadSpec, endpoint: str) -> str:
        if spec.quant != AS_STORED:
            return f"init_inference splits dense weights only; take deepspeed or {spec.quant}, not both"
        kernels = spec.option(KERNELS, False)
        if not isinstance(kernels, bool):
            return f"deepspeed: {KERNELS}={kernels!r} is not a boolean; write True or False"
        return why_ignored(spec, "device_map", "max_memory")

    def prepare(self, job: Job) -> None:
        # DeepSpeed's shared-memory all-reduce reads the number of local ranks, and dies of SIGSEGV if it is not set.
        os.environ["LOCAL_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", str(job.spec.world_size))
        if job.device.kind == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"

    def context(self, job: Job) -> None:
        import deepspeed

        # rank_shards too is imported here, since imports during the load would count towards its time.
        from pytest_llmload.worker.parallel import rank_shards, world

        assert rank_shards
        for name in (*_LATE, *(_COMPILER if job.spec.option(KERNELS) else ())):
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(name)
        if job.device.kind == "cpu":
            # An all-reduce through shared memory, which the first process on a machine compiles for 100 s. It makes
            # tokens faster, loads nothing and does not change a weight; torch's own all-reduce takes its place.
            builder = deepspeed.get_accelerator().create_op_builder("ShareMemCommBuilder")
            if builder is not None:
                deepspeed.ops.__compatible_ops__[builder.NAME] = False
        # Before DeepSpeed, which would have the ranks meet at a port that is open to every machine.
        world.join(job)
        deepspeed.init_distributed(dist_backend=world.backend(job), verbose=False)

    def load_kwargs(self, job: Job) -> dict[str, Any]:
        if job.spec.option(KERNELS) and job.device.kind != "cuda":
            raise ValueError(f"{KERNELS}=True needs a GPU: DeepSpeed has no kernels for the CPU")
        return {"device_map": {"": "cpu"}}

    def load(self, job: Job, kwargs: dict[str, Any]) -> Any:
        import deepspeed

        from pytest_llmload.worker.model.loading import from_pretrained
        from pytest_llmload.worker.model.tensors import Inventory
        from pytest_llmload.worker.parallel.rank_shards import split_shards, whole_shapes

        loaded = from_pretrained(job, kwargs)
        wholes = whole_shapes(loaded.model)
        whole_bytes = sum(held.nbytes for held in Inventory(loaded.model).distinct())
        self.classes = {type(module) for module in loaded.model.modules()}
        engine = deepspeed.init_inference(
            loaded.model,
            tensor_parallel={"tp_size": job.spec.world_size},
            dtype=loaded.model.dtype,
            replace_with_kernel_inject=bool(job.spec.option(KERNELS)),
        )
        loaded.engine = engine
        loaded.model = engine.module
        loaded.shards = split_shards(job, loaded.model, wholes, whole_bytes)
        return loaded

    def applied(self, job: Job, loaded: Loaded) -> Iterable[Problem]:
        """Check that DeepSpeed has replaced modules of the model by its own, and note which."""
        modules = loaded.inventory.modules
        new = sorted({type(module).__name__ for module in modules.values() if type(module) not in self.classes})
        if not new:
            return [Problem(self.name, "init_inference changed nothing: it replaced none of the model's modules")]
        loaded.notes.append(f"DeepSpeed put in: {', '.join(new)}")
        return []
