"""The methods of a run: the built-in ones and those that a hook registers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pytest_llmload.core.references import resolve
from pytest_llmload.quantisation.base import Method, Scheme
from pytest_llmload.quantisation.builtin import BUILTIN

if TYPE_CHECKING:
    from pytest_llmload.core.job import Job

#: Places in a device map where weights are not on the device that computes.
_OFF_DEVICE = {"cpu", "disk"}


class Methods:
    """Every method of a run, and their schemes by name.

    Args:
        references: ``module:Class`` of each method that a hook registers.

    Raises ValueError if two methods declare one scheme or have one name.
    """

    def __init__(self, references: Iterable[str] = ()) -> None:
        #: A registered method is asked first: it may know a module better than a built-in one.
        self.all: tuple[Method, ...] = (*(resolve(name)() for name in references), *(method() for method in BUILTIN))
        #: Name in ``quant(...)`` -> the scheme and its method, in the order of the documentation.
        self.schemes: dict[str, tuple[Scheme, Method]] = {}
        for method in sorted(self.all, key=lambda method: type(method) not in BUILTIN):
            for scheme in method.schemes:
                if scheme.name in self.schemes:
                    other = self.schemes[scheme.name][1].name
                    raise ValueError(
                        f"the scheme {scheme.name!r} is declared by two quantisation methods: {other}, {method.name}"
                    )
                self.schemes[scheme.name] = scheme, method


_active = Methods()
_references: tuple[str, ...] = ()


def use(references: tuple[str, ...]) -> None:
    """Make the built-in methods and ``references`` the methods of this load process."""
    global _active, _references
    if references != _references:
        _active, _references = Methods(references), references


def methods() -> tuple[Method, ...]:
    """Return the methods of this load process."""
    return _active.all


def schemes() -> dict[str, tuple[Scheme, Method]]:
    """Return the schemes of this load process, by name."""
    return _active.schemes


def method_of(scheme: str) -> Method:
    """Return the method that a scheme belongs to. Raises KeyError for an unknown name."""
    return _active.schemes[scheme][1]


def method_in_file(name: str) -> Method | None:
    """Return the method that checkpoints call ``name`` (``quant_method``); None if it is not known."""
    return next((method for method in methods() if name in method.file_methods), None)


def method_of_config(config: Any) -> Method | None:
    """Return the method that a ``quantization_config``, an object or a dict, names; None if it is not known."""
    named: Any = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", "")
    # An enumeration's member in the object, its value in the dict.
    return method_in_file(getattr(named, "value", named))


def with_default_skips(model: Any, named: Iterable[str]) -> tuple[str, ...]:
    """Return the modules that a ``quantization_config`` has to name so that ``named`` are dense too.

    Naming modules replaces transformers' defaults (transformers/quantizers/base.py, ``get_modules_to_not_convert``),
    output head and tied weights, so that the head would silently be quantised: both are named. There are none if
    ``named`` is empty. ``model`` may be on the meta device.
    """
    from transformers.quantizers.base import HfQuantizer

    own = tuple(named)
    return (*HfQuantizer.get_modules_to_not_convert(model), *own) if own else ()


def keep_offloaded_dense(job: Job, device_map: object, config: Any, *, offloads: bool = False) -> None:
    """Change a ``quantization_config`` as the scheme's method does it if a load leaves weights off the device.

    It does if its map does, or if ``offloads`` says so before there is a map. ``config`` is None for a load that
    quantises nothing; a user's own config is left as it is.
    """
    places = set(device_map.values()) if isinstance(device_map, Mapping) else set()
    offloads = offloads or (len(places) > 1 and bool(places & _OFF_DEVICE))
    if offloads and config is not None and job.spec.quant in _active.schemes:
        method_of(job.spec.quant).keep_offloaded_dense(job, config)
