"""What every strategy is: a declaration that pytest reads, and the loading that needs torch.

pytest imports a strategy's module at collection to read ``name``, ``fields`` and ``options``. Therefore torch and all
that imports it are imported inside the methods only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.job import HERE, Device, Job
from pytest_llmload.core.results import Problem

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.worker.model.loaded import Loaded


class Refused(Exception):
    """A library would not do what was asked; there is no model to look at, only the problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class Strategy:
    """One way of loading, or one facet of it: a placement, a dtype, a quantisation.

    A spec is served by the strategies of its facets: its placement (``spec.strategy``), its dtype, its quantisation.
    What they contribute to ``from_pretrained`` is merged; the placement's strategy calls it.
    """

    name: ClassVar[str]
    #: One sentence for the documentation and ``--llm-strategy`` errors.
    summary: ClassVar[str]
    #: What naming it sets in a LoadSpec.
    fields: ClassVar[dict[str, Any]] = {}
    #: What the ready-made suite loads beside its plain form, as fields of a LoadSpec.
    also: ClassVar[tuple[dict[str, Any], ...]] = ()
    #: True if a server that runs already (``--llm-endpoint``) may be its load.
    takes_endpoint: ClassVar[bool] = False
    #: True if it calls the user's own function (``target=``) in place of ``from_pretrained``. The product of such code
    #: is not known beforehand: only what the test's other markers say must hold of it.
    own_code: ClassVar[bool] = False
    #: True if its name is also a ``device_map``, so that the marker ``device_map(name)`` means it.
    is_device_map: ClassVar[bool] = False
    #: Its own options; others go to ``from_pretrained``.
    options: ClassVar[tuple[str, ...]] = ()
    #: Import names that it needs.
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "accelerate", "safetensors")
    #: Import names that the load of a running endpoint needs of this machine.
    client_packages: ClassVar[tuple[str, ...]] = ()
    #: Of these, what the warm server must not import: it would touch the GPU, or read settings of the load's process.
    cold_packages: ClassVar[tuple[str, ...]] = ()
    #: Which process has the model: ``HERE`` (the load's own), ``RANKS`` (``world_size`` processes, started through
    #: torch elastic) or ``SERVER`` (a model server, of which the load's process is a client).
    runs_in: ClassVar[str] = HERE
    #: Why no test can have the model itself, as one sentence; empty where it can.
    no_model: ClassVar[str] = ""
    #: Whether its output must be that of the model loaded whole, which is then loaded too, after all figures.
    same_output: ClassVar[bool] = False

    @classmethod
    def why_not_by_default(cls, device: Device) -> str:
        """Why the ready-made suite does not load it on a device unless it is named; empty where it does.

        What is split over several devices needs them.
        """
        world_size = cls.fields.get("world_size", 1)
        if world_size == 1:
            return ""
        if device.kind != "cuda":
            return f"on a CPU run only where --llm-strategy={cls.name} asks for it"
        gpus = len(device.gpus)
        return f"needs {world_size} GPUs, this run sees {gpus}" if gpus < world_size else ""

    @classmethod
    def refuses(cls, spec: LoadSpec, endpoint: str) -> str:
        """Why such a load cannot be, whatever the machine; empty where it can. Asked at collection.

        ``endpoint`` is the run's ``--llm-endpoint``.
        """
        return ""

    @classmethod
    def needs(cls, spec: LoadSpec) -> tuple[str, ...]:
        """Import names of the packages that a load needs."""
        return cls.packages

    def prepare(self, job: Job) -> None:
        """What must be set in the load's process before its libraries are imported."""

    def context(self, job: Job) -> None:
        """What must be there before the clock and the figures of the load start, after the device's own context."""

    #: The phase that ``wrap`` is reported as, within the load's time; empty where it does nothing.
    wrapping: ClassVar[str] = ""

    def load_kwargs(self, job: Job) -> dict[str, Any]:
        """Its contribution to ``from_pretrained``. Not timed: what production pays for belongs into ``load``."""
        return {}

    def load(self, job: Job, kwargs: dict[str, Any]) -> Any:
        """A model, ``(model, tokenizer)``, or a Loaded; called once, on the strategy of the placement only."""
        from pytest_llmload.worker.model.loading import from_pretrained

        return from_pretrained(job, kwargs)

    def wrap(self, job: Job, loaded: Loaded) -> Loaded:
        """What it does to the model that the placement's strategy loaded; timed as part of the load.

        Raises Refused where a library does not support the combination.
        """
        return loaded

    def applied(self, job: Job, loaded: Loaded) -> Iterable[Problem]:
        """Its own checks after the load, beside those that every load must pass."""
        return ()

    def exercised(self, job: Job, loaded: Loaded) -> Iterable[Problem]:
        """Its checks that run the model again; called after every figure has been taken."""
        return ()


#: Options of ``from_pretrained`` that choose files -> what names the same files to everything that reads them.
_CHOOSE_FILES = {
    "revision": "name it in the model: --llm-model=org/model@REVISION",
    "subfolder": "name that folder as the model: --llm-model=path/to/FOLDER",
    "variant": "give a folder that has those files under their plain names, model.safetensors",
    "gguf_file": "load it in a loader of your own: strategy('loader', target='module:function')",
    "use_safetensors": "give a folder that has only the files to load",
    "config": "give a folder with that config.json",
    "code_revision": "load it in a loader of your own: strategy('loader', target='module:function')",
}


def chooses_files(spec: LoadSpec, own: Iterable[str]) -> str:
    """Return why options of from_pretrained that choose files are refused; empty if a spec has none.

    ``own`` are the options that the spec's strategies declare, which mean something else. Digests, comparison and the
    baseline's name are those of the files that the model's own name stands for.
    """
    name = next((name for name in _CHOOSE_FILES if spec.option(name) is not None and name not in own), "")
    return f"{name}= would load other files than those that are compared: {_CHOOSE_FILES[name]}" if name else ""


def unheeded(spec: LoadSpec, *fields: str) -> str:
    """Why a placement refuses fields of a spec that it would ignore; empty where none of them is set."""
    found = " and ".join(name for name in fields if getattr(spec, name))
    return f"strategy({spec.strategy!r}) would ignore {found}: leave one of them away" if found else ""
