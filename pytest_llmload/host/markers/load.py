"""The markers that say what to load."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from pytest_llmload.host.markers.base import Fields, LoadMarker, Value, quoted

#: Options of ``quant``, which strategies of a quantisation take too.
_QUANT_OPTIONS = ("double_quant", "compute_dtype", "skip_modules", "dense_ok")
#: Attention implementations of transformers.
_ATTENTION = (
    *("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"),
    "paged|eager",
)
#: A device by its name in torch, or accelerate's for offloading.
_DEVICE = r"(cpu|cuda|disk|meta|mps|xpu|npu|hpu)(:\d+)?|\d+"
_ADAPTER_OPTIONS = ("adapter", "via", "merged")


class StrategyMarker(LoadMarker):
    """Load under these strategies; unknown options go to from_pretrained."""

    name = "strategy"
    lists = True

    @staticmethod
    def signature(*names: str, **options: Any) -> None: ...

    def read(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        return self.choices(args, list(self.strategies), lambda name: self._fields(name, kwargs, where), where)

    def _fields(self, name: str, kwargs: Fields, where: str) -> Fields:
        from pytest_llmload.core.references import absence, is_reference
        from pytest_llmload.host.markers.arguments import as_json, limits

        declared = self.strategies[name]
        found: Fields = dict(declared.fields)
        options = {}
        for key, value in kwargs.items():
            if key == "max_memory":
                found[key] = limits(value, f"{where}: strategy: max_memory")
            elif key in _QUANT_OPTIONS:
                found[key] = quant_option(key, value, f"{where}: strategy")
            elif key in _ADAPTER_OPTIONS and "adapter" in found:
                found |= adapter_fields({key: value}, self.settings.root, f"{where}: strategy")
            elif key == "world_size":
                found[key] = self._world_size(name, value, where)
            elif key == "target":
                if not declared.own_code:
                    raise pytest.UsageError(f"{where}: strategy({name!r}) has no target: it calls no function of yours")
                found[key] = value
            else:
                options[key] = as_json(value, f"{where}: strategy: {key}")
        if declared.own_code:
            found.setdefault("target", self.settings.loader)
            if not isinstance(found["target"], str) or not is_reference(found["target"]):
                raise pytest.UsageError(f"{where}: strategy({name!r}) needs target='pkg.mod:function', or --llm-loader")
            if "target" in kwargs and (lacks := absence(found["target"])):
                raise pytest.UsageError(f"{where}: strategy({name!r}): target={quoted(found['target'])}: {lacks}")
        if options:
            found["options"] = tuple(sorted(options.items()))
        return found

    def _world_size(self, name: str, value: object, where: str) -> int:
        if "world_size" not in self.strategies[name].fields:
            raise pytest.UsageError(f"{where}: strategy({name!r}) has no world_size: it is not split over ranks")
        if type(value) is not int or value < 1:
            raise pytest.UsageError(
                f"{where}: world_size={quoted(value)}; write a whole number of shards or ranks, at least 1"
            )
        return value

    def extra_keywords(self) -> tuple[str, ...]:
        return ("world_size", "target", "max_memory")

    def from_keywords(self, keywords: Fields) -> tuple[tuple[Any, ...], Fields] | None:
        # Without a strategy of its own, max_memory belongs to the device map.
        placed = "strategy" in keywords and "device_map" not in keywords
        own = ("world_size", "target", *(["max_memory"] if placed else []))
        options = {**keywords.pop("options", {}), **{key: keywords.pop(key) for key in own if key in keywords}}
        if not options and "strategy" not in keywords:
            return None
        default = self.strategies.of_own_code() if "target" in options else self.strategies.default
        return (keywords.pop("strategy", default),), options


class QuantMarker(LoadMarker):
    """Load quantised: none (as the checkpoint says), int8, nf4, fp4, or a scheme of a different method."""

    name = "quant"
    lists = True

    @staticmethod
    def signature(
        *schemes: str,
        double_quant: bool = False,
        compute_dtype: str | None = None,
        skip_modules: Any = (),
        dense_ok: Any = (),
        config: str | None = None,
    ) -> None: ...

    def read(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        from pytest_llmload.core.spec import AS_STORED

        if kwargs.get("config") is not None:
            return [Value(self._configured(args, kwargs, where))]
        options = {key: quant_option(key, value, f"{where}: quant") for key, value in kwargs.items()}

        def fields(scheme: str) -> Fields:
            return {"quant": scheme} | {
                key: value for key, value in options.items() if key in self.strategies.heeded(scheme)
            }

        values = self.choices(args, (AS_STORED, *self.strategies.schemes), fields, where)
        for key in options:
            # One marker may list schemes of which some do not have an option, but not all.
            if not any(key in value.fields for value in values):
                schemes = ", ".join(repr(value.fields["quant"]) for value in values)
                raise pytest.UsageError(f"{where}: quant({schemes}) has no option {key}; leave it out")
        return values

    def _configured(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> Fields:
        """Return the fields of ``config=``: the function that it names decides how the model is quantised."""
        from pytest_llmload.core.references import absence, is_reference
        from pytest_llmload.core.spec import BY_CONFIG

        config = kwargs["config"]
        if others := [*(repr(arg) for arg in args if arg != BY_CONFIG), *(key for key in kwargs if key != "config")]:
            raise pytest.UsageError(
                f"{where}: quant: config= decides how the model is quantised; leave out {', '.join(others)}"
            )
        if not isinstance(config, str) or not is_reference(config):
            raise pytest.UsageError(
                f"{where}: quant: config={quoted(config)} is not an import string; write 'pkg.mod:function'"
            )
        if lacks := absence(config):
            raise pytest.UsageError(f"{where}: quant: config={quoted(config)}: {lacks}")
        return {"quant": BY_CONFIG, "quant_config": config}

    def extra_keywords(self) -> tuple[str, ...]:
        return tuple(self.keywords())

    def from_keywords(self, keywords: Fields) -> tuple[tuple[Any, ...], Fields] | None:
        from pytest_llmload.core.spec import AS_STORED, BY_CONFIG

        options = {key: keywords.pop(key) for key in self.extra_keywords() if key in keywords}
        if not options and "quant" not in keywords:
            return None
        default = BY_CONFIG if "config" in options else AS_STORED
        return (keywords.pop("quant", default),), options


class DtypeMarker(LoadMarker):
    """Load in fp32, fp16 or bf16."""

    name = "dtype"
    lists = True

    @staticmethod
    def signature(*names: str) -> None: ...

    def read(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        from pytest_llmload.core.spec import DTYPES

        return self.choices(args, DTYPES, lambda name: {"dtype": name}, where)


class LoraMarker(LoadMarker):
    """Load with a PEFT adapter."""

    name = "lora"
    telling = r"random$|.*/"

    @staticmethod
    def signature(adapter: str | None = None, via: str = "peft", merged: bool = False) -> None: ...

    def read(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        given = {**dict(zip(self.keywords(), args, strict=False)), **kwargs}
        # An empty name is the run's adapter, unless another marker names one.
        return [Value({"adapter": "", **adapter_fields(given, self.settings.root, where)})]

    def extra_keywords(self) -> tuple[str, ...]:
        return tuple(self.keywords())

    def from_keywords(self, keywords: Fields) -> tuple[tuple[Any, ...], Fields] | None:
        options = {key: keywords.pop(key) for key in self.extra_keywords() if key in keywords}
        if not options and "lora" not in keywords:
            return None
        adapter = keywords.pop("lora", True)
        return (), {"adapter": None if adapter is True else adapter, **options}


class DeviceMapMarker(LoadMarker):
    """Load with this device map, perhaps under limits such as {0: '10GiB', 'cpu': '30GiB'}."""

    name = "device_map"
    telling = r"(auto|balanced|sequential|cpu|disk|cuda(:\d+)?)$"

    @staticmethod
    def signature(value: Any, max_memory: Any = None) -> None: ...

    def read(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        from pytest_llmload.host.markers.arguments import as_json, limits

        value = self.one(args, kwargs)
        fields: Fields
        if isinstance(value, str) and value in self.strategies and self.strategies[value].is_device_map:
            fields = dict(self.strategies[value].fields)
        elif isinstance(value, str) and re.fullmatch(_DEVICE, value) is None:
            known = [name for name in self.strategies if self.strategies[name].is_device_map]
            raise pytest.UsageError(
                f"{where}: device_map: {quoted(value)} is neither a device nor one of {', '.join(known)}"
                f"{meant(value, known)}"
            )
        elif isinstance(value, (str, int, dict)):
            mapping = value if isinstance(value, dict) else {"": value}
            fields = {"device_map": as_json(mapping, f"{where}: device_map")}
        else:
            raise pytest.UsageError(
                f"{where}: device_map: {quoted(value)} is neither a name, a device nor a map of modules"
            )
        if kwargs.get("max_memory"):
            fields["max_memory"] = limits(kwargs["max_memory"], f"{where}: device_map: max_memory")
        return [Value(fields)]

    def from_keywords(self, keywords: Fields) -> tuple[tuple[Any, ...], Fields] | None:
        # What a strategy took is gone by now.
        if "device_map" not in keywords and "max_memory" not in keywords:
            return None
        given = {"max_memory": keywords.pop("max_memory")} if "max_memory" in keywords else {}
        return (keywords.pop("device_map", "auto"),), given


class GpuCountMarker(LoadMarker):
    """Give the load n GPUs; skip where fewer are visible."""

    name = "gpu_count"
    hardware = True

    @staticmethod
    def signature(n: int) -> None: ...

    def read(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        count = self.one(args, kwargs)
        if type(count) is not int or count < 1:
            raise pytest.UsageError(f"{where}: gpu_count({quoted(count)}): write a whole number of GPUs, at least 1")
        return [Value({"gpu_count": count})]


class AttnMarker(LoadMarker):
    """Load with this attention implementation, and check that it is the one in use."""

    name = "attn"
    telling = r"(eager|sdpa)$|flash_|flex_|paged|.*/"

    @staticmethod
    def signature(name: str) -> None: ...

    def read(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        name = _text(self.one(args, kwargs), f"{where}: attn")
        # Libraries register further names, so only what looks like a known one, or like its beginning, is refused.
        beginning = re.sub(r"[\W\d_]+$", "", name.lower())
        begins = len(beginning) > 2 and any(known.startswith(beginning) for known in _ATTENTION)
        likely = meant(name, _ATTENTION)
        if name not in _ATTENTION and (likely or begins):
            raise pytest.UsageError(
                f"{where}: attn: unknown {quoted(name)}{likely}; use one of {', '.join(_ATTENTION)}, a kernel's "
                "repository as org/name, or a name that a module of --llm-import registers"
            )
        return [Value({"attn": name})]


class AutoClassMarker(LoadMarker):
    """Load with this Auto class instead of the one the config's architecture names."""

    name = "auto_class"
    telling = r"Auto[A-Z]"

    @staticmethod
    def signature(name: str) -> None: ...

    def read(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        from pytest_llmload.core.libraries import auto_classes

        name = _text(self.one(args, kwargs), f"{where}: auto_class")
        known = auto_classes()
        # Any class of transformers may be named, and one that the user's code registers.
        if name.startswith("Auto") and known and name not in known:
            raise pytest.UsageError(
                f"{where}: auto_class: the installed transformers has no {quoted(name)}{meant(name, known)}"
            )
        return [Value({"auto_class": name})]


class WorkloadMarker(LoadMarker):
    """Take the figures on this workload: BATCHxPROMPT+NEW, as in '4x2048+64'."""

    name = "workload"

    @staticmethod
    def signature(text: str) -> None: ...

    def read(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        from pytest_llmload.core import spec

        try:
            return [Value({"workload": spec.Workload.parse(self.one(args, kwargs))})]
        except ValueError as error:
            raise pytest.UsageError(f"{where}: workload: {error}") from None


def quant_option(name: str, value: object, where: str) -> object:
    """Return one option of ``quant`` as a LoadSpec holds it. Raises UsageError."""
    from pytest_llmload.core.spec import DTYPES
    from pytest_llmload.host.markers.arguments import flag, names

    if name == "double_quant":
        return flag(value, f"{where}: {name}")
    if name != "compute_dtype":
        return tuple(sorted(set(names(value, f"{where}: {name}"))))
    if value is not None and value not in DTYPES:
        raise pytest.UsageError(f"{where}: unknown compute_dtype {quoted(value)}; use one of {', '.join(DTYPES)}")
    return value


def adapter_fields(given: Fields, root: Any, where: str) -> Fields:
    """Return the fields of ``adapter=``, ``via=`` and ``merged=``, of those that are given. Raises UsageError."""
    from pytest_llmload.core.spec import ADAPTER_WAYS
    from pytest_llmload.host.markers.arguments import flag
    from pytest_llmload.host.settings.adapters import parse_adapter

    found: Fields = {}
    if given.get("adapter") is not None:
        try:
            found["adapter"] = parse_adapter(given["adapter"], root, root)
        except ValueError as error:
            raise pytest.UsageError(f"{where}: lora: {error}") from None
    if "via" in given:
        if given["via"] not in ADAPTER_WAYS:
            known = " or ".join(map(repr, ADAPTER_WAYS))
            raise pytest.UsageError(f"{where}: lora: unknown via={given['via']!r}; write {known}")
        found["adapter_via"] = given["via"]
    if "merged" in given:
        found["adapter_merged"] = flag(given["merged"], f"{where}: lora: merged")
    return found


def meant(text: str, known: Sequence[str]) -> str:
    """Return ``; did you mean 'sdpa'?`` for a text that resembles a known one, else nothing."""
    import difflib

    alike = difflib.get_close_matches(text, known, n=1, cutoff=0.7)
    return f"; did you mean {alike[0]!r}?" if alike else ""


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise pytest.UsageError(f"{where}: {quoted(value)} is not a name; write a text")
    return value
