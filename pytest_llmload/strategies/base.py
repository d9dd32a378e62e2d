"""The base class of strategies: a declaration that pytest reads, and the loading, which needs torch.

pytest imports a strategy's module at collection to read ``name``, ``fields`` and ``options``. Therefore import torch,
and every module that imports it, inside the methods only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.job import HERE, Device, Job
from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import counted
from pytest_llmload.worker.planning.placement import Placement

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.worker.model.loaded import Loaded


class Refused(Exception):
    """A library refuses to load as the test requests: there is no model to check, only a problem to report."""

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
    #: The fields of a LoadSpec that naming the strategy sets.
    fields: ClassVar[dict[str, Any]] = {}
    #: Further variants that the ready-made suite loads besides the plain one, each as fields of a LoadSpec.
    also: ClassVar[tuple[dict[str, Any], ...]] = ()
    #: True if a running server (``--llm-endpoint``) can serve as its load.
    takes_endpoint: ClassVar[bool] = False
    #: True if it calls the user's own function (``target=``) in place of ``from_pretrained``. What such code returns is
    #: not known beforehand, so that only what the test's other markers state is checked.
    own_code: ClassVar[bool] = False
    #: True if its name is also a ``device_map``, so that the marker ``device_map(name)`` selects this strategy.
    is_device_map: ClassVar[bool] = False
    #: How the strategy places weights, for the planner; None if it does so by rules that the planner does not know.
    placement: ClassVar[Placement | None] = None
    #: The strategy's own options; all others are passed to ``from_pretrained``.
    options: ClassVar[tuple[str, ...]] = ()
    #: Import names of the packages that the strategy needs.
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "accelerate", "safetensors")
    #: Import names of the packages that this machine needs in order to use a running endpoint.
    client_packages: ClassVar[tuple[str, ...]] = ()
    #: Those of the packages that the warm server must not import, because their import touches the GPU or reads
    #: settings of the load's process.
    cold_packages: ClassVar[tuple[str, ...]] = ()
    #: The process that has the model: ``HERE`` (the load's own), ``RANKS`` (``world_size`` processes, started through
    #: torch elastic) or ``SERVER`` (a model server, of which the load's process is a client).
    runs_in: ClassVar[str] = HERE
    #: Why a test cannot have the model itself, as one sentence; empty if it can.
    no_model: ClassVar[str] = ""
    #: True if its output must equal that of the model loaded whole, which is then loaded too, after all measurements.
    same_output: ClassVar[bool] = False

    @classmethod
    def why_not_by_default(cls, device: Device) -> str:
        """Return why the ready-made suite loads it on a device only if it is named; empty if it always loads it.

        A strategy that splits a model over several GPUs is left out if the device has too few.
        """
        world_size = cls.fields.get("world_size", 1)
        if world_size == 1:
            return ""
        if device.kind != "cuda":
            return f"on a CPU run only if --llm-strategy={cls.name} requests it"
        gpus = len(device.gpus)
        return f"needs {counted(world_size, 'GPU')}, this run sees {gpus}" if gpus < world_size else ""

    @classmethod
    def refuses(cls, spec: LoadSpec, endpoint: str) -> str:
        """Return why such a load is impossible on any machine, as one sentence; empty if it is possible.

        Called at collection. ``endpoint`` is the run's ``--llm-endpoint``, or empty.
        """
        return ""

    @classmethod
    def needs(cls, spec: LoadSpec) -> tuple[str, ...]:
        """Return the import names of the packages that a load needs."""
        return cls.packages

    def prepare(self, job: Job) -> None:
        """Set what the libraries read from the load's process; called before they are imported."""

    def context(self, job: Job) -> None:
        """Create what must exist before the load is timed and measured; called after the device's context exists."""

    #: The phase that ``wrap`` is reported as, within the load's time; empty if ``wrap`` does nothing.
    wrapping: ClassVar[str] = ""

    def load_kwargs(self, job: Job) -> dict[str, Any]:
        """Return the strategy's keyword arguments for ``from_pretrained``.

        This call is not timed: work that production pays for belongs into ``load``.
        """
        return {}

    def load(self, job: Job, kwargs: dict[str, Any]) -> Any:
        """Load, and return a model, ``(model, tokenizer)`` or a Loaded.

        Called once, on the strategy of the placement only.
        """
        from pytest_llmload.worker.model.loading import from_pretrained

        return from_pretrained(job, kwargs)

    def wrap(self, job: Job, loaded: Loaded) -> Loaded:
        """Change the model that the placement's strategy loaded, and return it; timed as part of the load.

        Raises Refused if a library does not support the combination.
        """
        return loaded

    def applied(self, job: Job, loaded: Loaded) -> Iterable[Problem]:
        """Return the problems that the strategy's own checks find after the load, besides the checks of every load."""
        return ()

    def exercised(self, job: Job, loaded: Loaded) -> Iterable[Problem]:
        """Return the problems found by checks that run the model again; called after all measurements."""
        return ()

    def why_not_run(self, job: Job, loaded: Loaded) -> str:
        """Return what may explain that the loaded model raises when it runs; empty if nothing is known."""
        return ""


#: Options of ``from_pretrained`` that choose files -> how to name the same files so that every reader uses them.
_CHOOSE_FILES = {
    "revision": "name it in the model: --llm-model=org/model@REVISION",
    "subfolder": "name that folder as the model: --llm-model=path/to/FOLDER",
    "variant": "give a folder that has those files under their plain names, model.safetensors",
    "gguf_file": "name that file as the model: --llm-model=path/to/FILE.gguf",
    "use_safetensors": "give a folder that has only the files to load",
    "config": "give a folder with that config.json",
    "code_revision": "load it in a loader of your own: strategy('loader', target='module:function')",
}


def chooses_files(spec: LoadSpec, own: Iterable[str]) -> str:
    """Return why options of from_pretrained that choose files are refused; empty if a spec has none.

    ``own`` are the options that the spec's strategies declare, which mean something else. Digests, the comparison with
    the checkpoint and the baseline's name all use the files that the model's name stands for.
    """
    name = next((name for name in _CHOOSE_FILES if spec.option(name) is not None and name not in own), "")
    return f"{name}= would load different files from those that are compared: {_CHOOSE_FILES[name]}" if name else ""


def why_ignored(spec: LoadSpec, *fields: str) -> str:
    """Return why a placement refuses fields of a spec that it would ignore; empty if none of them is set."""
    found = " and ".join(name for name in fields if getattr(spec, name))
    return f"strategy({spec.strategy!r}) would ignore {found}: omit one of them" if found else ""
