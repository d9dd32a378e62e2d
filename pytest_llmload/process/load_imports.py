"""Import every module that a load needs, before the load is timed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from pytest_llmload.core.job import Job
from pytest_llmload.core.libraries import LIBRARY, PLACEMENT, is_installed
from pytest_llmload.quantisation import registry
from pytest_llmload.strategies.base import Strategy
from pytest_llmload.system import garbage
from pytest_llmload.worker.checkpoints.digests import read_config
from pytest_llmload.worker.checkpoints.quantisation_config import read_format

#: Modules that attaching an adapter imports -> the packages that they need.
_PEFT = {
    "peft": "peft",
    "transformers.integrations.peft": "peft",
    "peft.utils.transformers_weight_conversion": "transformers.conversion_mapping",
}


def import_all(job: Job, served_by: list[Strategy], *, cold: bool = True) -> None:
    """Import the libraries, the architecture's modules, the strategies' packages, and the user's own modules.

    Without ``cold``, import only those that a process may import which is forked again before it loads.

    Raises ImportError if a package is not installed.
    """
    for path in reversed(job.sys_path):
        if path not in sys.path:
            sys.path.insert(0, path)
    packages = {package: None for strategy in served_by for package in strategy.packages}
    left_out = set() if cold else {package for strategy in served_by for package in strategy.cold_packages}
    with garbage.collected_rarely():
        for package in packages:
            if package not in left_out:
                importlib.import_module(package)
        if find_spec("transformers") is not None:
            # A user's own loader most likely uses them too, even if it does not say so.
            for name in (*LIBRARY, *PLACEMENT, *_of_method(job)):
                if find_spec(name.partition(".")[0]) is not None:
                    importlib.import_module(name)
            _import_architecture(job)
            fill_caches()
    if cold:
        _import_own(job)


def _import_own(job: Job) -> None:
    """Import the modules that a load alone imports: those of its checkpoint's quantiser, of its adapter, and those that
    the user names.
    """
    for name in _of_file(job):
        importlib.import_module(name)
    if job.adapter is not None:
        for name in filter(is_installed, _for_adapters()):
            importlib.import_module(name)
    for name in job.imports:
        importlib.import_module(name)
    for reference in filter(None, (job.spec.target, job.spec.quant_config)):
        importlib.import_module(reference.partition(":")[0])


def _for_adapters() -> Iterator[str]:
    """Yield the modules that attaching an adapter imports, as far as the packages that they need are installed."""
    yield from (name for name, needed in _PEFT.items() if is_installed(needed))
    for method in registry.methods():
        if method.is_installed():
            yield from method.peft_modules


def _of_method(job: Job) -> tuple[str, ...]:
    """Return the modules that the method of the load's scheme declares as imported by a load."""
    found = registry.schemes().get(job.spec.quant)
    return found[1].imports if found is not None else ()


def _of_file(job: Job) -> Iterator[str]:
    """Yield the modules that a load imports for the method of a quantised checkpoint, as far as they are installed.

    Some of them touch a GPU: they are not for a process that is forked again.
    """
    stored = read_format(job.checkpoint.path)
    for method in registry.methods():
        if stored is not None and stored.method in method.file_methods:
            yield from filter(is_installed, method.imports)


def fill_caches() -> None:
    """Make transformers 5 compile its table of weight renamings of all architectures, as a process's first load does.

    A release that has no such table, or makes it in a different function, makes it in the load.
    """
    if find_spec("transformers.conversion_mapping") is None:
        return
    from transformers import conversion_mapping

    make = getattr(conversion_mapping, "get_checkpoint_conversion_mapping", None)
    if make is not None:
        # It makes the entries of all architectures, for any argument.
        make("")


def _import_architecture(job: Job) -> None:
    """Import the classes that the checkpoint names, and the modules of its model type and its component types."""
    import transformers
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    config = read_config(Path(job.checkpoint.path))
    names = [*(config.get("architectures") or ()), job.spec.auto_class]
    for name in names:
        if name and hasattr(transformers, name):
            getattr(transformers, name)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for model_type in {str(part["model_type"]) for part in parts if part.get("model_type")}:
        package = f"transformers.models.{model_type_to_module_name(model_type)}"
        if find_spec(package) is None:
            # The type is defined by the checkpoint's own code.
            continue
        name = package.rpartition(".")[2]
        for module in (f"{package}.configuration_{name}", f"{package}.modeling_{name}"):
            if find_spec(module) is not None:
                importlib.import_module(module)
