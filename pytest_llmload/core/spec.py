"""What to load: :class:`LoadSpec`, the one thing that markers, options and factories all turn into."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any

from pytest_llmload.core.canonical import digest
from pytest_llmload.core.portable import portable_spec

DTYPES = ("fp32", "fp16", "bf16")
#: Values of ``quant`` that are not schemes: as the checkpoint says, and by a ``quantization_config`` of the user's.
NONE, BY_CONFIG = "none", "config"
#: ``PeftModel.from_pretrained``, and transformers' own ``model.load_adapter``.
ADAPTER_WAYS = ("peft", "load_adapter")
#: The placement of a load that no marker places: everything on the one device it asked for.
SINGLE = "single"


#: Options of every strategy that relax a check and change nothing in the load, as ``dense_ok`` does.
CHECK_OPTIONS = ("keys_ok",)

#: What a free text must be to stand in a file's name as it is.
_PLAIN = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True)
class Workload:
    """What is generated when figures are taken: ``batch`` x ``prompt_tokens`` + ``new_tokens``."""

    batch: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 32

    @classmethod
    def parse(cls, text: object) -> Workload:
        """From ``"4x2048+64"``. ValueError says what to write."""
        match = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text) if isinstance(text, str) else None
        if match is None or not all(int(part) for part in match.groups()):
            raise ValueError(f"{text!r} is not a workload: write BATCHxPROMPT+NEW, each at least 1, as in '1x128+32'")
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{self.batch}x{self.prompt_tokens}+{self.new_tokens}"


def _checks_only() -> Any:
    return field(default=(), metadata={"checks_only": True})


@dataclass(frozen=True, kw_only=True)
class LoadSpec:
    """One way of loading one model. Equal specs are one load, however they were spelled.

    Plain, hashable and JSON-able; mappings are sorted tuples of pairs, free-form values canonical JSON.
    """

    #: ``--llm-model``'s SPEC: hub id, ``hub-id@revision``, directory, ``random:PRESET`` or ``random:PATH``.
    model: str
    #: The model's name in ids and baselines.
    name: str
    #: How the model is placed: ``single``, ``auto``, ``max_memory``, ``offload``, ``tensor_parallel``, ``loader`` …
    strategy: str = SINGLE
    #: ``fp32``, ``fp16``, ``bf16``; None: as the checkpoint says.
    dtype: str | None = None
    #: A scheme of a quantisation method (``nf4``); ``none``: as the checkpoint says.
    quant: str = NONE
    #: The user's function that returns a ``quantization_config``, ``pkg.mod:function``; called with the spec.
    quant_config: str | None = None
    double_quant: bool = False
    compute_dtype: str | None = None
    #: Module names the quantiser is told to leave alone, added to its defaults.
    skip_modules: tuple[str, ...] = ()
    #: Patterns of weights that may stay dense; relaxes the check, changes nothing in the load.
    dense_ok: tuple[str, ...] = _checks_only()
    #: GPUs that the load's process sees (none on a CPU run).
    gpu_count: int = 1
    #: Shards or ranks of a parallel strategy.
    world_size: int = 1
    #: ``device_map`` as canonical JSON, where it is a map of modules.
    device_map: str | None = None
    #: Limit in bytes per device: ``("0", 10737418240)``, ``("cpu", …)``.
    max_memory: tuple[tuple[str, int], ...] = ()
    #: A PEFT adapter: ``random``, a hub id, or a directory: ``./below/the/root/directory``, or absolute.
    adapter: str | None = None
    #: ``peft`` (PeftModel) or ``load_adapter`` (transformers' integration).
    adapter_via: str = "peft"
    adapter_merged: bool = False
    #: Attention implementation; None: the library's choice.
    attn: str | None = None
    #: ``AutoModelForCausalLM`` …; None: the class named in the config's ``architectures``.
    auto_class: str | None = None
    #: The user's loader, ``pkg.mod:function``.
    target: str | None = None
    #: Further ``from_pretrained`` or strategy options: name, canonical JSON.
    options: tuple[tuple[str, str], ...] = ()
    #: Environment variables of the load's process that differ from the run's.
    env: tuple[tuple[str, str], ...] = ()
    workload: Workload = Workload()
    #: Whether the workload is the test's own; the run's (``--llm-workload``) is not part of the slug.
    own_workload: bool = False

    def facets(self) -> list[str]:
        """Return the names of the strategies that serve it: its placement, dtype, quantisation, adapter."""
        names = [self.strategy, self.dtype, self.quant if self.quant != "none" else None]
        names.append("lora" if self.adapter is not None else None)
        return [name for name in names if name is not None]

    @property
    def slug(self) -> str:
        """The variant's name in ids and baseline files.

        ``[strategy[-xN]][-quant[-dq][-compute]][-dtype][+lora[-merged][-load_adapter]][+loader][+attn][+wBxP-N]
        [+digest]``, ``none`` where all is as the checkpoint says. What has no short form, or cannot stand in a
        file's name, is in the digest, which is the same on every machine.
        """
        references = {name: (getattr(self, name) or "").replace(":", ".") for name in ("target", "quant_config")}
        texts = {**references, "attn": self.attn or ""}
        unnamed = [name for name, text in texts.items() if not _PLAIN.fullmatch(text)]
        what = []
        if self.strategy != SINGLE:
            what.append(f"{self.strategy}-x{self.world_size}" if self.world_size > 1 else self.strategy)
        if self.quant != "none":
            what.append(self.quant)
            what += ["dq"] if self.double_quant else []
            what += [self.compute_dtype] if self.compute_dtype else []
        slug = "-".join(what)
        if self.dtype:
            slug += f"+{self.dtype}" if self.quant != "none" else f"-{self.dtype}" if slug else self.dtype
        slug = slug or "none"
        if self.adapter is not None:
            slug += "+lora" + ("-merged" if self.adapter_merged else "")
            slug += f"-{self.adapter_via}" if self.adapter_via != "peft" else ""
        slug += "".join(f"+{text}" for name, text in texts.items() if name not in unnamed)
        if self.own_workload:
            slug += f"+w{self.workload.batch}x{self.workload.prompt_tokens}-{self.workload.new_tokens}"
        rest = {
            name: value
            for name, value in (
                ("skip_modules", self.skip_modules),
                ("device_map", self.device_map),
                ("max_memory", self.max_memory),
                ("adapter", self.adapter if self.adapter != "random" else None),
                ("auto_class", self.auto_class),
                ("options", self._load_options),
                ("env", self.env),
                *((name, getattr(self, name)) for name in unnamed),
            )
            if value
        }
        return f"{slug}+{digest(portable_spec(rest), 8)}" if rest else slug

    @property
    def _load_options(self) -> tuple[tuple[str, str], ...]:
        """The options without those that only relax a check."""
        return tuple((name, value) for name, value in self.options if name not in CHECK_OPTIONS)

    @property
    def label(self) -> str:
        """The slug, with the GPUs where there are several: what tells the loads of one model apart in a run."""
        many = self.gpu_count > 1 and self.world_size == 1
        return f"{self.slug}-x{self.gpu_count}" if many else self.slug

    @property
    def id(self) -> str:
        """``tiny-llama-nf4``: the model's name and the label."""
        return f"{self.name}-{self.label}"

    def identity(self) -> dict[str, Any]:
        """What makes two loads of one model the same variant: every field but the model's place and mere checks."""
        unchecked = dataclasses.replace(self, options=self._load_options)
        return {
            item.name: _plain(getattr(unchecked, item.name))
            for item in dataclasses.fields(self)
            if item.name not in ("model", "name", "workload", "own_workload")
            and not item.metadata.get("checks_only")
            and getattr(unchecked, item.name) != item.default
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain data that JSON can hold; :meth:`from_json` reads it."""
        return {item.name: _plain(getattr(self, item.name)) for item in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LoadSpec:
        """Return the spec that :meth:`to_json` wrote. Raises TypeError, KeyError or ValueError for anything else."""
        values = {name: _frozen(value) for name, value in data.items()}
        values["workload"] = Workload.parse(data["workload"])
        return cls(**values)

    def option(self, name: str, default: Any = None) -> Any:
        """One of ``options``, decoded."""
        return next((json.loads(text) for key, text in self.options if key == name), default)


def _plain(value: Any) -> Any:
    if isinstance(value, Workload):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
