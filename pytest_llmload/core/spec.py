"""What to load: :class:`LoadSpec`, which markers, options and factories all produce."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any

from pytest_llmload.core.canonical import digest
from pytest_llmload.core.portable import portable_spec
from pytest_llmload.core.quoting import quoted

DTYPES = ("fp32", "fp16", "bf16")
#: Values of ``quant`` that are not schemes: as the checkpoint says, and as the user's ``quantization_config`` says.
AS_STORED, BY_CONFIG = "none", "config"
#: ``PeftModel.from_pretrained``, and transformers' own ``model.load_adapter``.
ADAPTER_WAYS = ("peft", "load_adapter")
#: The placement of a load without a placement marker: everything on its one device.
SINGLE = "single"


#: Options of every strategy that relax a check without changing the load, as ``dense_ok`` does.
CHECK_OPTIONS = ("keys_ok",)

#: Free text that may be part of a file name unchanged.
_PLAIN = re.compile(r"[\w.-]{1,64}")


@dataclass(frozen=True)
class Workload:
    """The generation that is measured: ``batch`` prompts of ``prompt_tokens``, each continued by ``new_tokens``."""

    batch: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 32

    @classmethod
    def parse(cls, text: object) -> Workload:
        """Return the workload that ``"4x2048+64"`` describes. Raises ValueError that says what to write."""
        match = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", text) if isinstance(text, str) else None
        if match is None or not all(int(part) for part in match.groups()):
            raise ValueError(
                f"{quoted(text)} is not a workload: write BATCHxPROMPT+NEW, each at least 1, as in '1x128+32'"
            )
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{self.batch}x{self.prompt_tokens}+{self.new_tokens}"


def _checks_only() -> Any:
    return field(default=(), metadata={"checks_only": True})


@dataclass(frozen=True, kw_only=True)
class LoadSpec:
    """One way of loading one model. Equal specs share one load, however they were written.

    Plain, hashable and JSON-able; mappings are sorted tuples of pairs, free-form values canonical JSON.
    """

    #: ``--llm-model``'s SPEC: hub id, ``hub-id@revision``, directory, ``random:PRESET`` or ``random:PATH``.
    model: str
    #: The model's name in ids and baselines.
    name: str
    #: How the model is placed: ``single``, ``auto``, ``max_memory``, ``offload``, ``tensor_parallel``, ``loader`` …
    strategy: str = SINGLE
    #: ``fp32``, ``fp16`` or ``bf16``; None for the checkpoint's own.
    dtype: str | None = None
    #: A scheme of a quantisation method (``nf4``); ``none`` for the checkpoint's own.
    quant: str = AS_STORED
    #: The user's function ``pkg.mod:function`` that is called with the spec and returns a ``quantization_config``.
    quant_config: str | None = None
    double_quant: bool = False
    compute_dtype: str | None = None
    #: Names of modules that the quantiser leaves dense, in addition to its defaults.
    skip_modules: tuple[str, ...] = ()
    #: Patterns of weights that may stay dense; they relax the check without changing the load.
    dense_ok: tuple[str, ...] = _checks_only()
    #: GPUs that the load's process sees (none on a CPU run).
    gpu_count: int = 1
    #: Shards or ranks of a parallel strategy.
    world_size: int = 1
    #: ``device_map`` as canonical JSON, if it is a map of modules.
    device_map: str | None = None
    #: Limit in bytes per device: ``("0", 10737418240)``, ``("cpu", …)``.
    max_memory: tuple[tuple[str, int], ...] = ()
    #: A PEFT adapter: ``random``, a hub id, or a directory: ``./below/the/root/directory``, or absolute.
    adapter: str | None = None
    #: ``peft`` (PeftModel) or ``load_adapter`` (transformers' integration).
    adapter_via: str = "peft"
    adapter_merged: bool = False
    #: Attention implementation; None for the library's choice.
    attn: str | None = None
    #: ``AutoModelForCausalLM`` …; None for the class that the config names in ``architectures``.
    auto_class: str | None = None
    #: The user's loader, ``pkg.mod:function``.
    target: str | None = None
    #: Further ``from_pretrained`` or strategy options: name, canonical JSON.
    options: tuple[tuple[str, str], ...] = ()
    #: Environment variables of the load's process that differ from the run's.
    env: tuple[tuple[str, str], ...] = ()
    workload: Workload = Workload()
    #: True if the workload is the test's own; the run's (``--llm-workload``) is not part of the slug.
    own_workload: bool = False

    def facets(self) -> list[str]:
        """Return the names of the strategies that the spec uses: its placement, dtype, quantisation, adapter."""
        names = [self.strategy, self.dtype, self.quant if self.quant != AS_STORED else None]
        names.append("lora" if self.adapter is not None else None)
        return [name for name in names if name is not None]

    @property
    def slug(self) -> str:
        """Return the variant's name in test ids and baseline files.

        ``[strategy[-xN]][-quant[-dq][-compute]][-dtype][+lora[-merged][-load_adapter]][+loader][+attn][+wBxP-N]
        [+digest]``, or ``none`` if everything is as the checkpoint says. Fields that have no short form, or cannot be
        part of a file name, go into the digest, which is the same on every machine.
        """
        references = {name: (getattr(self, name) or "").replace(":", ".") for name in ("target", "quant_config")}
        texts = {**references, "attn": self.attn or ""}
        unnamed = [name for name, text in texts.items() if not _PLAIN.fullmatch(text)]
        what = []
        if self.strategy != SINGLE:
            what.append(f"{self.strategy}-x{self.world_size}" if self.world_size > 1 else self.strategy)
        if self.quant != AS_STORED:
            what.append(self.quant)
            what += ["dq"] if self.double_quant else []
            what += [self.compute_dtype] if self.compute_dtype else []
        slug = "-".join(what)
        if self.dtype:
            slug += f"+{self.dtype}" if self.quant != AS_STORED else f"-{self.dtype}" if slug else self.dtype
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
        """Return the options without those that only relax a check."""
        return tuple((name, value) for name, value in self.options if name not in CHECK_OPTIONS)

    @property
    def label(self) -> str:
        """Return the slug, with the number of GPUs if there are several; unique among a model's loads in a run."""
        many = self.gpu_count > 1 and self.world_size == 1
        return f"{self.slug}-x{self.gpu_count}" if many else self.slug

    @property
    def id(self) -> str:
        """Return the model's name and the label: ``tiny-llama-nf4``."""
        return f"{self.name}-{self.label}"

    def identity(self) -> dict[str, Any]:
        """Return the fields that two loads of the same variant share: all except the model's place and mere checks."""
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
        """Return the decoded value of one of ``options``, or ``default``."""
        return next((json.loads(text) for key, text in self.options if key == name), default)


def _plain(value: Any) -> Any:
    if isinstance(value, Workload):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
