"""Turn the markers of a test into its :class:`LoadSpec` variants.

The nearest node (function, class, module) wins per marker name; the same marker twice on one node gives both
variants; different markers multiply.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pytest_llmload.core.job import RANKS
from pytest_llmload.core.spec import AS_STORED, LoadSpec
from pytest_llmload.host.markers.base import Fields, Value
from pytest_llmload.host.markers.nearest import nearest
from pytest_llmload.host.markers.table import LOAD_MARKERS
from pytest_llmload.host.settings.adapters import RANDOM
from pytest_llmload.strategies.base import chooses_files
from pytest_llmload.system.nodes import nodes

if TYPE_CHECKING:
    from pytest_llmload.host.loads.strategies import Strategies
    from pytest_llmload.host.settings.models import Model
    from pytest_llmload.host.settings.settings import Settings


class Variant(NamedTuple):
    """One load of one test."""

    spec: LoadSpec
    id: str
    marks: tuple[pytest.Mark, ...]


class Marks:
    """The marks of a test, as loads. Raises UsageError that names the test, the marker and what to write."""

    def __init__(self, settings: Settings, strategies: Strategies) -> None:
        self._settings = settings
        self._strategies = strategies
        self._markers = {name: marker(settings, strategies) for name, marker in LOAD_MARKERS.items()}

    def variants(self, definition: pytest.Item, models: Sequence[Model], suite: Sequence[Fields]) -> list[Variant]:
        """Return every load that a test requests; ``suite`` replaces the defaults of the ready-made suite's tests."""
        where = definition.nodeid
        axes = [
            [value for mark in nearest(definition, name) for value in self._values(mark, where)]
            for name in self._markers
        ]
        axes = [axis for axis in axes if axis]
        named = {field for axis in axes for value in axis for field in value.fields}
        if nearest(definition, "strategy"):
            # Also one that names only a dtype or a scheme.
            named.add("strategy")
        axes += self._defaults(named, suite, where)
        found: list[Variant] = []
        for model in models:
            for values in product(*axes):
                variant = self._variant(model, values, where)
                if not any((variant.spec, variant.marks) == (other.spec, other.marks) for other in found):
                    found.append(variant)
        return found

    def spec(self, model: Model, values: Sequence[Value], where: str) -> LoadSpec:
        """Return the LoadSpec of one value of each marker. Raises UsageError for a load that is impossible."""
        spec = self._merged(model, values, where)
        if spec.adapter is not None and "world_size" in self._strategies[spec.strategy].fields:
            raise pytest.UsageError(
                f"{where}: lora with strategy({spec.strategy!r}): an adapter on a model that is split over ranks is "
                "not supported; merge it into the checkpoint, or place the model by a device map"
            )
        facets = self._strategies.of(spec)
        own = {option for facet in facets for option in facet.options}
        reasons = [self._without_effect(spec), _said_twice(spec, own), self._other_count(spec)]
        reasons.append("" if self._strategies[spec.strategy].own_code else chooses_files(spec, own))
        reasons += [facet.refuses(spec, self._settings.endpoint or "") for facet in facets]
        if reason := next(filter(None, reasons), ""):
            raise pytest.UsageError(f"{where}: {reason}")
        return spec

    def _without_effect(self, spec: LoadSpec) -> str:
        """Return which option of ``quant`` would change a load's name and nothing else; empty if there is none."""
        for option in ("double_quant", "compute_dtype", "skip_modules"):
            if getattr(spec, option) and option not in self._strategies.heeded(spec.quant):
                heeding = [name for name in self._strategies.schemes if option in self._strategies.heeded(name)]
                load = spec.quant if spec.quant != AS_STORED else spec.dtype or spec.strategy
                return f"{option} has no effect on {load!r}; it belongs to quant({', '.join(map(repr, heeding))})"
        return ""

    def _other_count(self, spec: LoadSpec) -> str:
        """Return how ``gpu_count`` contradicts the shards or ranks of a load; empty if it does not."""
        declaration = self._strategies[spec.strategy]
        if spec.gpu_count == 1 or "world_size" not in declaration.fields:
            return ""
        if spec.world_size == spec.gpu_count * (nodes() if declaration.runs_in == RANKS else 1):
            return ""
        return (
            f"gpu_count({spec.gpu_count}) contradicts world_size={spec.world_size} of strategy({spec.strategy!r}), "
            "which takes a GPU for each: remove gpu_count, or give both the same number"
        )

    def _merged(self, model: Model, values: Sequence[Value], where: str) -> LoadSpec:
        fields: Fields = {}
        for value in values:
            for name, setting in value.fields.items():
                if name == "options":
                    setting = tuple(sorted({**dict(fields.get("options", ())), **dict(setting)}.items()))
                elif name == "adapter" and "" in (setting, fields.get(name)):
                    # "The run's adapter" applies only if a different marker does not name an adapter.
                    setting = setting or fields.get(name, "")
                elif fields.setdefault(name, setting) != setting:
                    raise pytest.UsageError(
                        f"{where}: contradicting markers: {name} is {fields[name]!r} by one and {setting!r} by another"
                    )
                fields[name] = setting
        if fields.get("adapter") == "":
            fields["adapter"] = self._settings.adapter or RANDOM
        workload = fields.pop("workload", self._settings.workload)
        return LoadSpec(
            model=model.spec,
            name=model.name,
            workload=workload,
            own_workload=workload != self._settings.workload,
            **fields,
        )

    def from_keywords(self, where: str, **keywords: Any) -> list[Value]:
        """Return values from the keywords of ``llm_load(quant="nf4", double_quant=True, …)``.

        Raises UsageError for a value that a marker refuses, and TypeError for a keyword of no marker.
        """
        __tracebackhide__ = True
        values = []
        env = keywords.pop("env", {})
        if env:
            values.append(Value({"env": tuple(sorted(env.items()))}))
        for name, marker in self._markers.items():
            if (found := marker.from_keywords(keywords)) is not None:
                args, kwargs = found
                values += self._values(getattr(pytest.mark, name)(*args, **kwargs).mark, where)
        if keywords:
            unknown = next(iter(keywords))
            known = ["model", "shared", "env", "options", *self._markers]
            known += [word for marker in self._markers.values() for word in marker.extra_keywords()]
            alike = difflib.get_close_matches(unknown, known, n=1)
            meant = f"; did you mean {alike[0]!r}?" if alike else ""
            raise TypeError(f"{where}: unknown keyword {unknown!r}{meant}; known: {', '.join(known)}")
        return values

    def _variant(self, model: Model, values: Sequence[Value], where: str) -> Variant:
        with_inner = [[value, *self._inner(value, where)] for value in values]
        spec = self.spec(model, [each for group in with_inner for each in group], where)
        name = spec.id
        if any(value.id is not None for value in values):
            name = model.name
            for value, group in zip(values, with_inner, strict=True):
                # "none+eager" says "+eager" after what the other markers say.
                part = value.id or self._merged(model, group, where).label.removeprefix("none")
                name += part if part.startswith(("+", "-")) or not part else f"-{part}"
        marks = (mark for value in values for mark in value.marks if mark.name not in LOAD_MARKERS)
        return Variant(spec, name, tuple(marks))

    def _inner(self, value: Value, where: str) -> list[Value]:
        """Return the values that the load markers inside a ``pytest.param`` add to its value."""
        marks = (mark for mark in value.marks if mark.name in LOAD_MARKERS)
        return [inner for mark in marks for inner in self._values(mark, where)]

    def _defaults(self, named: set[str], suite: Sequence[Fields], where: str) -> list[list[Value]]:
        if suite:
            return [[Value(fields) for fields in suite]]
        settings = self._settings
        says_how = named & {"strategy", "quant", "dtype", "adapter", "target"}
        if settings.strategies and not says_how:
            mark = pytest.mark.strategy(*settings.strategies).mark
            return [self._values(mark, f"--llm-strategy (for {where})")]
        if settings.endpoint and not says_how:
            return [[Value(dict(self._strategies[self._strategies.of_endpoint()].fields))]]
        if settings.loader and not named & {"strategy", "target"}:
            return [[Value({"strategy": self._strategies.of_own_code(), "target": settings.loader})]]
        return []

    def _values(self, mark: pytest.Mark, where: str) -> list[Value]:
        return self._markers[mark.name].values(mark, where)

    def claims(self, mark: pytest.Mark) -> bool:
        """Return whether a load marker on a test without a load is meant for this plugin, not another's label.

        Of a marker that takes any text, only a text that is hardly a label of another suite counts.
        """
        try:
            values = self._values(mark, mark.name)
        except pytest.UsageError:
            return False
        texts = [value for value in mark.args if isinstance(value, str)]
        telling = self._markers[mark.name].telling
        return bool(values and (mark.args or mark.kwargs)) and all(re.match(telling, text) for text in texts)

    def gpus(self, mark: pytest.Mark, where: str) -> int:
        """Return the number of GPUs that a mark ``gpu_count`` requests. Raises UsageError."""
        (value,) = self._values(mark, where)
        return int(value.fields["gpu_count"])


def _said_twice(spec: LoadSpec, own: set[str]) -> str:
    """Return which option for from_pretrained a marker sets too; empty if there is none.

    ``own`` are the options that the load's strategies take themselves.
    """
    for option, (marker, said) in {
        "dtype": ("dtype", spec.dtype),
        "torch_dtype": ("dtype", spec.dtype),
        "attn_implementation": ("attn", spec.attn),
        "quantization_config": ("quant", spec.quant if spec.quant != AS_STORED else None),
    }.items():
        value = spec.option(option)
        if option not in own and None not in (said, value) and value != said:
            return f"{option}={value!r} contradicts {marker} {said!r}: remove the option"
    return ""
