"""Markers: their signatures and help, and how they turn into the :class:`LoadSpec` variants of a test.

The nearest node (function, class, module) wins per marker name; the same marker twice on one node gives both
variants; different markers multiply.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pytest_llmload.core.job import RANKS
from pytest_llmload.core.references import is_reference
from pytest_llmload.core.spec import ADAPTER_WAYS, DTYPES, SINGLE, LoadSpec, Workload
from pytest_llmload.host.markers.arguments import as_json, flag, limits, names
from pytest_llmload.host.markers.nearest import nearest, unpacked
from pytest_llmload.host.markers.signatures import LOAD_MARKERS, signature_text
from pytest_llmload.host.settings.adapters import RANDOM, parse_adapter
from pytest_llmload.system.nodes import nodes

if TYPE_CHECKING:
    from pytest_llmload.host.loads.strategies import Strategies
    from pytest_llmload.host.settings.models import Model
    from pytest_llmload.host.settings.options import Settings

Fields = dict[str, Any]
_QUANT_OPTIONS = ("double_quant", "compute_dtype", "skip_modules", "dense_ok")
#: Options of ``strategy`` that ``llm_load`` takes as keywords of its own.
_STRATEGY_OPTIONS = ("max_memory", "world_size", "target")
#: Markers that list several values.
_LISTS = ("strategy", "quant", "dtype")
#: How the text of a marker begins that takes any text.
_TELLING = {
    "lora": r"random$|.*/",
    "device_map": r"(auto|balanced|sequential|cpu|disk|cuda(:\d+)?)$",
    "attn": r"(eager|sdpa)$|flash_|flex_|paged|.*/",
    "auto_class": r"Auto[A-Z]",
}


class Value(NamedTuple):
    """One value of one marker: the fields of a LoadSpec that it sets."""

    fields: Fields
    id: str | None = None
    marks: tuple[pytest.Mark, ...] = ()


class Variant(NamedTuple):
    """One load of one test."""

    spec: LoadSpec
    id: str
    marks: tuple[pytest.Mark, ...]


class Marks:
    """Reads the marks of a test. Raises UsageError that names the test, the marker and what to write."""

    def __init__(self, settings: Settings, strategies: Strategies) -> None:
        self._settings = settings
        self._strategies = strategies

    def variants(self, definition: pytest.Item, models: Sequence[Model], suite: Sequence[Fields]) -> list[Variant]:
        """Every load that a test asks for; ``suite`` replaces the defaults of a test of the ready-made suite."""
        where = definition.nodeid
        axes = [
            [value for mark in nearest(definition, name) for value in self._values(mark, where)]
            for name in LOAD_MARKERS
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
        """One LoadSpec from a value of each marker. Raises UsageError for a load that cannot be."""
        spec = self._merged(model, values, where)
        if spec.adapter is not None and "world_size" in self._strategies[spec.strategy].fields:
            raise pytest.UsageError(
                f"{where}: lora with strategy({spec.strategy!r}): an adapter on a model that is split over ranks is "
                "not supported; merge it into the checkpoint, or place the model by a device map"
            )
        facets = self._strategies.of(spec)
        own = {option for facet in facets for option in facet.options}
        reasons = [self._without_effect(spec), _said_twice(spec, own), self._other_count(spec)]
        reasons += [facet.refuses(spec, self._settings.endpoint or "") for facet in facets]
        if reason := next(filter(None, reasons), ""):
            raise pytest.UsageError(f"{where}: {reason}")
        return spec

    def _other_count(self, spec: LoadSpec) -> str:
        """How ``gpu_count`` contradicts the shards or ranks of a load; empty where it does not."""
        declaration = self._strategies[spec.strategy]
        if spec.gpu_count == 1 or "world_size" not in declaration.fields:
            return ""
        if spec.world_size == spec.gpu_count * (nodes() if declaration.runs_in == RANKS else 1):
            return ""
        return (
            f"gpu_count({spec.gpu_count}) contradicts world_size={spec.world_size} of strategy({spec.strategy!r}), "
            "which takes a GPU for each: leave gpu_count away, or give both the same number"
        )

    def _merged(self, model: Model, values: Sequence[Value], where: str) -> LoadSpec:
        fields: Fields = {}
        for value in values:
            for name, setting in value.fields.items():
                if name == "options":
                    setting = tuple(sorted({**dict(fields.get("options", ())), **dict(setting)}.items()))
                elif name == "adapter" and "" in (setting, fields.get(name)):
                    # "The run's adapter", which gives way to one that another marker names.
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
        """Values from ``llm_load(quant="nf4", double_quant=True, …)``: keywords of the markers of the same names."""
        values = []
        quant_options = {key: keywords.pop(key) for key in _keywords("quant") if key in keywords}
        lora_options = {key: keywords.pop(key) for key in _keywords("lora") if key in keywords}
        options = keywords.pop("options", {})
        env = keywords.pop("env", {})
        if "quant" in keywords or quant_options:
            values.append(self._one("quant", (keywords.pop("quant", "none"),), quant_options, where))
        if "lora" in keywords or lora_options:
            adapter = keywords.pop("lora", True)
            lora_options.setdefault("adapter", None if adapter is True else adapter)
            values.append(self._one("lora", (), lora_options, where))
        if "device_map" in keywords or ("max_memory" in keywords and "strategy" not in keywords):
            given = {"max_memory": keywords.pop("max_memory")} if "max_memory" in keywords else {}
            values.append(self._one("device_map", (keywords.pop("device_map", "auto"),), given, where))
        options = {**options, **{key: keywords.pop(key) for key in _STRATEGY_OPTIONS if key in keywords}}
        if options or "strategy" in keywords:
            default = "loader" if "target" in options else SINGLE
            values.append(self._one("strategy", (keywords.pop("strategy", default),), options, where))
        if env:
            values.append(Value({"env": tuple(sorted(env.items()))}))
        for name, value in keywords.items():
            if name not in LOAD_MARKERS:
                raise TypeError(f"{where}: unknown keyword {name!r}; known: {', '.join(LOAD_MARKERS)}, options, env")
            values.append(self._one(name, (value,), {}, where))
        return values

    def _one(self, name: str, args: tuple[Any, ...], kwargs: Fields, where: str) -> Value:
        (value,) = self._values(getattr(pytest.mark, name)(*args, **kwargs).mark, where)
        return value

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
        """What the load markers inside a ``pytest.param`` add to its value."""
        marks = (mark for mark in value.marks if mark.name in LOAD_MARKERS)
        return [inner for mark in marks for inner in self._values(mark, where)]

    def _defaults(self, named: set[str], suite: Sequence[Fields], where: str) -> list[list[Value]]:
        if suite:
            return [[Value(fields) for fields in suite]]
        settings = self._settings
        says_how = named & {"strategy", "quant", "dtype", "adapter", "target"}
        if settings.strategies and not says_how:
            return [[self._strategy((name,), {}, f"--llm-strategy (for {where})")[0] for name in settings.strategies]]
        if settings.endpoint and not says_how:
            return [[Value(dict(self._strategies["served"].fields))]]
        if settings.loader and not named & {"strategy", "target"}:
            return [[Value({"strategy": "loader", "target": settings.loader})]]
        return []

    def _values(self, mark: pytest.Mark, where: str) -> list[Value]:
        read: Callable[..., list[Value]] = getattr(self, f"_{mark.name}")
        try:
            inspect.signature(LOAD_MARKERS[mark.name]).bind(*mark.args, **mark.kwargs)
        except TypeError as error:
            raise pytest.UsageError(f"{where}: {mark.name}: {error}; {usage(mark.name)}") from None
        if mark.name in _LISTS:
            return read(mark.args, dict(mark.kwargs), where)
        # Of one value each, which may be a pytest.param too.
        args = list(unpacked(mark.args, f"{where}: {mark.name}"))
        kwargs = dict(zip(mark.kwargs, unpacked(mark.kwargs.values(), f"{where}: {mark.name}"), strict=True))
        parts = [*args, *kwargs.values()]
        identity = next((name for _, name, _ in parts if name is not None), None)
        marks = tuple(inner for _, _, inners in parts for inner in inners)
        values = read(tuple(arg for arg, _, _ in args), {name: value for name, (value, _, _) in kwargs.items()}, where)
        return [Value(value.fields, identity, marks) for value in values]

    def claims(self, mark: pytest.Mark) -> bool:
        """Whether a load marker on a test without a load is meant for us; in other suites the names are labels.

        Where any text would do, only one that hardly is somebody's label.
        """
        try:
            values = self._values(mark, mark.name)
        except pytest.UsageError:
            return False
        texts = [value for value in mark.args if isinstance(value, str)]
        telling = _TELLING.get(mark.name, "")
        return bool(values and (mark.args or mark.kwargs)) and all(re.match(telling, text) for text in texts)

    def _choices(
        self, name: str, args: Sequence[Any], allowed: Sequence[str], make: Callable[[Any], Fields], where: str
    ) -> list[Value]:
        if not args:
            raise pytest.UsageError(f"{where}: {name} names nothing: one or more of {', '.join(allowed)}")
        values = []
        for arg, identity, marks in unpacked(args, f"{where}: {name}"):
            if arg not in allowed:
                raise pytest.UsageError(f"{where}: {name}: unknown {arg!r}: one of {', '.join(allowed)}")
            values.append(Value(make(arg), identity, marks))
        return values

    def _quant(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        kwargs = {key: _quant_option(key, value, f"{where}: quant") for key, value in kwargs.items()}

        def fields(scheme: str) -> Fields:
            return {"quant": scheme} | {key: value for key, value in kwargs.items() if key in self._heeded(scheme)}

        values = self._choices("quant", args, ("none", *self._strategies.schemes), fields, where)
        for key in kwargs:
            # One marker may list schemes that an option says nothing about, but not only such.
            if not any(key in value.fields for value in values):
                schemes = ", ".join(repr(value.fields["quant"]) for value in values)
                raise pytest.UsageError(f"{where}: quant({schemes}) has no {key}")
        return values

    def _heeded(self, scheme: str) -> tuple[str, ...]:
        """Return the options of ``quant`` that a scheme heeds."""
        found = self._strategies.schemes.get(scheme)
        return found.options if found is not None else ()

    def _without_effect(self, spec: LoadSpec) -> str:
        """Return which option of ``quant`` would change a load's name and nothing else; empty if there is none."""
        for option in ("double_quant", "compute_dtype", "skip_modules"):
            if getattr(spec, option) and option not in self._heeded(spec.quant):
                heeding = [name for name in self._strategies.schemes if option in self._heeded(name)]
                load = spec.quant if spec.quant != "none" else spec.dtype or spec.strategy
                return f"{option} has no effect on {load!r}; it belongs to quant({', '.join(map(repr, heeding))})"
        return ""

    def _dtype(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        return self._choices("dtype", args, DTYPES, lambda name: {"dtype": name}, where)

    def _strategy(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        def fields(name: str) -> Fields:
            found: Fields = dict(self._strategies[name].fields)
            options = {}
            for key, value in kwargs.items():
                if key == "max_memory":
                    found[key] = limits(value, f"{where}: strategy: max_memory")
                elif key in _QUANT_OPTIONS:
                    found[key] = _quant_option(key, value, f"{where}: strategy")
                elif key in ("adapter", "via", "merged") and "adapter" in found:
                    found |= self._adapter({key: value}, f"{where}: strategy")
                elif key == "world_size":
                    found[key] = self._world_size(name, value, where)
                elif key == "target":
                    found[key] = self._target(name, value, where)
                else:
                    options[key] = as_json(value, f"{where}: strategy: {key}")
            if name == "loader":
                found.setdefault("target", self._settings.loader)
                if not isinstance(found["target"], str) or not is_reference(found["target"]):
                    raise pytest.UsageError(
                        f"{where}: strategy('loader') needs target='pkg.mod:function', or --llm-loader"
                    )
            if options:
                found["options"] = tuple(sorted(options.items()))
            return found

        return self._choices("strategy", args, list(self._strategies), fields, where)

    def _target(self, name: str, value: object, where: str) -> object:
        if "target" not in self._strategies[name].options:
            raise pytest.UsageError(f"{where}: strategy({name!r}) has no target: it calls no function of yours")
        return value

    def _world_size(self, name: str, value: object, where: str) -> int:
        if "world_size" not in self._strategies[name].fields:
            raise pytest.UsageError(f"{where}: strategy({name!r}) has no world_size: it is not split over ranks")
        if type(value) is not int or value < 1:
            raise pytest.UsageError(f"{where}: world_size={value!r}: a whole number of shards or ranks, at least 1")
        return value

    def _gpu_count(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        count = args[0] if args else kwargs["n"]
        if type(count) is not int or count < 1:
            raise pytest.UsageError(f"{where}: gpu_count({count!r}): a whole number of GPUs, at least 1")
        return [Value({"gpu_count": count})]

    def gpus(self, mark: pytest.Mark, where: str) -> int:
        """The GPUs that a ``gpu_count`` asks for."""
        (value,) = self._values(mark, where)
        return int(value.fields["gpu_count"])

    def _lora(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        parameters = inspect.signature(LOAD_MARKERS["lora"]).parameters
        return [Value({"adapter": "", **self._adapter({**dict(zip(parameters, args, strict=False)), **kwargs}, where)})]

    def _adapter(self, given: Fields, where: str) -> Fields:
        """The fields of ``adapter=``, ``via=`` and ``merged=``; only those that differ from the defaults' meaning."""
        found: Fields = {}
        if given.get("adapter") is not None:
            try:
                found["adapter"] = parse_adapter(given["adapter"], self._settings.root, self._settings.root)
            except ValueError as error:
                raise pytest.UsageError(f"{where}: lora: {error}") from None
        if "via" in given:
            if given["via"] not in ADAPTER_WAYS:
                known = " or ".join(map(repr, ADAPTER_WAYS))
                raise pytest.UsageError(f"{where}: lora: unknown via {given['via']!r}: {known}")
            found["adapter_via"] = given["via"]
        if "merged" in given:
            found["adapter_merged"] = flag(given["merged"], f"{where}: lora: merged")
        return found

    def _device_map(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        value = args[0] if args else kwargs["value"]
        fields: Fields
        if isinstance(value, str) and value in self._strategies and value in ("auto", "balanced", "sequential"):
            fields = {"strategy": value}
        elif isinstance(value, (str, int, dict)):
            mapping = value if isinstance(value, dict) else {"": value}
            fields = {"device_map": as_json(mapping, f"{where}: device_map")}
        else:
            raise pytest.UsageError(f"{where}: device_map: {value!r} is neither a name, a device nor a map of modules")
        if kwargs.get("max_memory"):
            fields["max_memory"] = limits(kwargs["max_memory"], f"{where}: device_map: max_memory")
        return [Value(fields)]

    def _text(self, name: str, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        value = args[0] if args else kwargs["name"]
        if not isinstance(value, str) or not value:
            raise pytest.UsageError(f"{where}: {name}: {value!r} is not a name")
        return [Value({name: value})]

    def _attn(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        return self._text("attn", args, kwargs, where)

    def _auto_class(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        return self._text("auto_class", args, kwargs, where)

    def _workload(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        try:
            return [Value({"workload": Workload.parse(args[0] if args else kwargs["text"])})]
        except ValueError as error:
            raise pytest.UsageError(f"{where}: workload: {error}") from None


def usage(name: str) -> str:
    return f"write {name}{signature_text(LOAD_MARKERS[name])}"


def _keywords(name: str) -> list[str]:
    parameters = inspect.signature(LOAD_MARKERS[name]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]


def _quant_option(name: str, value: object, where: str) -> object:
    if name == "double_quant":
        return flag(value, f"{where}: {name}")
    if name != "compute_dtype":
        return tuple(sorted(set(names(value, f"{where}: {name}"))))
    if value is not None and value not in DTYPES:
        raise pytest.UsageError(f"{where}: unknown compute_dtype {value!r}: one of {', '.join(DTYPES)}")
    return value


def _said_twice(spec: LoadSpec, own: set[str]) -> str:
    """Which option for from_pretrained says what a marker says too; empty where there is none.

    ``own`` are the options that the load's strategies take themselves.
    """
    for option, (marker, said) in {
        "dtype": ("dtype", spec.dtype),
        "torch_dtype": ("dtype", spec.dtype),
        "attn_implementation": ("attn", spec.attn),
        "quantization_config": ("quant", spec.quant if spec.quant != "none" else None),
    }.items():
        value = spec.option(option)
        if option not in own and None not in (said, value) and value != said:
            return f"{option}={value!r} contradicts {marker} {said!r}: leave the option away"
    return ""
