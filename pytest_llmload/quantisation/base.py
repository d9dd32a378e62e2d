"""The base classes of quantisation methods: a declaration that pytest reads, and the reading of weights with torch.

pytest imports a method's module at collection to read its schemes. Therefore torch, and all that imports it, is
imported inside the methods only. A method works on modules and tensors and does not know about files or checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.libraries import is_installed

if TYPE_CHECKING:
    from pytest_llmload.core.job import Job

#: Options of the marker ``quant`` that a scheme may heed.
SKIP_MODULES, DENSE_OK, DOUBLE_QUANT, COMPUTE_DTYPE = "skip_modules", "dense_ok", "double_quant", "compute_dtype"


@dataclass(frozen=True)
class ServeFlag:
    """The request for a scheme to ``transformers serve``."""

    #: The value of its option ``--quantization``.
    flag: str
    #: Fields of a LoadSpec that describe what the server then loads.
    fields: Mapping[str, Any] = field(default_factory=dict)
    #: One sentence for the report if the spec requests something else than these fields.
    note: str = ""


@dataclass(frozen=True)
class Scheme:
    """One name in ``quant(...)``."""

    name: str
    #: One sentence for the documentation.
    summary: str
    #: Bits that the packed values take per element, without scales.
    bits: float
    #: Options of the marker ``quant`` that it heeds.
    options: tuple[str, ...] = (SKIP_MODULES, DENSE_OK)
    #: Import names of the packages that it needs in addition to its method's.
    packages: tuple[str, ...] = ()
    #: True if the ready-made suite loads it by default.
    by_default: bool = False
    #: Variants that the ready-made suite loads too, as fields of a LoadSpec.
    also: tuple[dict[str, Any], ...] = ()
    #: The request for it to ``transformers serve``; None if the server has no option for it.
    served: ServeFlag | None = None


@dataclass(frozen=True)
class Request:
    """The quantisation that the weights should have, according to the test or to the checkpoint's own config."""

    #: A scheme's name; empty if any scheme of the method is right.
    scheme: str
    double_quant: bool = False
    #: torch's name of the dtype that products are computed in; empty if any is right.
    compute: str = ""
    #: Modules that are left dense on purpose.
    skips: tuple[str, ...] = ()
    #: True if double quant is right although it was not requested: a user's own loader decides that itself.
    may_nest: bool = False


@dataclass(frozen=True)
class FileFormat:
    """The content of a checkpoint's ``quantization_config``."""

    #: ``quant_method``: ``bitsandbytes``, ``gptq``, ``awq``, ``fp8``, ``mxfp4``, ``compressed-tensors`` …
    method: str
    #: Text for people: ``gptq 4 bit group=128``.
    description: str
    #: The scheme that made it, if ``quant(...)`` has one; else empty.
    scheme: str = ""
    double_quant: bool = False
    #: The dtype that products are computed in: ``fp32``, ``fp16``, ``bf16``; empty if the config does not say.
    compute: str = ""
    #: Modules that it says were left dense.
    skips: tuple[str, ...] = ()
    #: The ``quantization_config`` itself.
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Stored:
    """One quantised weight as a module holds it. Each method has its own subclasses.

    ``data`` and the other tensors may be lazy slices of a checkpoint's file (``slice[a:b]`` and ``slice[a:b, c:d]``
    return tensors), so that a block is dequantised from a file by the same code as from a module.
    """

    #: The scheme of the values: ``nf4``, ``int8``, ``gptq-int4``.
    scheme: str
    #: Shape of the weight that they stand for.
    shape: tuple[int, ...]
    #: The packed values, a plain tensor.
    data: Any
    #: The module's own parameters and buffers that hold the weight, the packed values first.
    holders: tuple[str, ...] = ("weight",)
    #: Name of the weight in its module, as the dense model has it.
    name: str = "weight"
    #: The scheme's name in the state, which kernels go by; empty if that is the scheme.
    label: str = ""
    #: dtype that products are computed in; empty if the module does not say.
    compute: str = ""

    @property
    def max_error(self) -> float | None:
        """Return the largest error of an element, relative to the largest value of its block.

        It has room for the rounding of weight and scale to 16 bit. None if values cannot be compared with the dense
        original.
        """
        return None

    @property
    def scale_error(self) -> float:
        """Return the largest error of a scale that is quantised itself, relative to the largest scale of its block."""
        return 0.0

    @property
    def elements(self) -> int:
        """Return the number of elements of the weight that the values stand for."""
        return math.prod(self.shape)

    @property
    def block(self) -> int:
        """Return how many elements, row by row, are dequantised and compared at once: a whole number of scales."""
        return int(self.shape[-1])

    @property
    def unit(self) -> int:
        """Return the elements of one block; a weight that has fewer than :attr:`block` is its only block."""
        return min(self.block, self.elements)

    @property
    def bits(self) -> float:
        """Return the bits that the packed values should take per element."""
        raise NotImplementedError

    @property
    def packed_bytes(self) -> int:
        """Return the bytes that the packed values really take."""
        return int(self.data.numel() * self.data.element_size())

    def describe(self) -> str:
        """Return the entry for the manifest: the scheme, then flags and ``name=value`` pairs, separated by spaces."""
        raise NotImplementedError

    def statistics(self) -> Iterator[tuple[str, Any]]:
        """Yield the floating tensors that belong to the packed values, with a name for messages."""
        return iter(())

    def kept(self) -> dict[str, Any]:
        """Return the tensors that an already quantised checkpoint holds value by value, by their names there.

        The names are relative to the module: ``weight``, ``weight.absmax``, ``SCB``.
        """
        return {self.holders[0]: self.data}

    def dequantised(self, start: int, stop: int) -> Any:
        """Return elements ``start`` to ``stop``, row by row, as float32 on the CPU.

        The code follows the format, without the library's kernels, so that a wrong kernel does not judge itself.
        Raises NotImplementedError if the format is not known well enough.
        """
        raise NotImplementedError

    def dequantised_blocks(self, numbers: Sequence[int]) -> Any:
        """Return blocks by their numbers as :meth:`dequantised` does, block x element.

        Blocks have :attr:`unit` elements. A method whose values lie on a device may bring all of them to the CPU in one
        copy.
        """
        import torch

        size = self.unit
        each = [self.dequantised(number * size, (number + 1) * size) for number in numbers]
        # A user's own method may return whole rows as a matrix.
        return torch.stack(each).reshape(len(each), size)

    def rounded(self, values: Any) -> Any:
        """Return whole blocks of dense values (float32, flat) as this quantiser would hold them, dequantised.

        None if that depends on more than the values: calibration data, an optimiser.
        """
        return None

    def differences(self, request: Request) -> Iterator[str]:
        """Yield one sentence for each difference from the request, except for the scheme and the size."""
        return iter(())


class Method:
    """One library or format that quantises weights.

    To add a method, write a subclass and register it: with the hook ``pytest_llmload_quantisation`` for your own
    method, in ``quantisation/builtin.py`` for a method of this project.
    """

    #: Its name in tables and messages.
    name: ClassVar[str]
    #: One sentence for the documentation.
    summary: ClassVar[str]
    #: The names in ``quant(...)`` under which transformers quantises with it while loading.
    schemes: ClassVar[tuple[Scheme, ...]] = ()
    #: Import names of the packages that it needs in addition to transformers.
    packages: ClassVar[tuple[str, ...]] = ()
    #: Modules that a load imports before its clock starts.
    imports: ClassVar[tuple[str, ...]] = ()
    #: ``quant_method`` in a checkpoint's config.
    file_methods: ClassVar[tuple[str, ...]] = ()
    #: Names of the method in transformers' table of quantisers; empty: those of ``file_methods``.
    transformers_names: ClassVar[tuple[str, ...]] = ()
    #: Settings of its config that ``strategy(...)`` and ``llm_load(options=)`` take under their own names.
    settings: ClassVar[tuple[str, ...]] = ()
    #: The file name, without suffix, of the compiled library that a server which uses it has mapped; empty if none.
    library: ClassVar[str] = ""
    #: The file name of the compiled library that it loads beside one build of torch, for which ``{build}`` stands:
    #: ``cpu``, ``cuda130``, ``rocm64``; empty if it has none.
    binary: ClassVar[str] = ""
    #: The environment variable that makes it load the library of a different CUDA release, by the release's digits.
    binary_variable: ClassVar[str] = ""
    #: Loggers whose warnings during a load are shown with it, besides those of transformers, accelerate and peft.
    loggers: ClassVar[tuple[str, ...]] = ()
    #: Modules of peft that it imports for an adapter on any model, if the method's packages are installed.
    peft_modules: ClassVar[tuple[str, ...]] = ()
    #: The names by which a generation config requests its quantised cache in transformers; ``""`` stands for a config
    #: that names no backend.
    cache_backends: ClassVar[tuple[str, ...]] = ()
    #: Operators of torch that read a condition on activations, which a prediction does not know -> what is assumed if
    #: the condition does not hold.
    assumptions: ClassVar[Mapping[str, str]] = {}
    #: Its functions in the phases of a load: module, function names (empty: all), ``read``, ``convert`` or ``move``.
    phases: ClassVar[tuple[tuple[str, tuple[str, ...], str], ...]] = ()
    #: For the documentation: where a load runs quantised, where its bytes are, and which facts about them are verified.
    runs_on: ClassVar[str] = ""
    held_as: ClassVar[str] = ""
    proved: ClassVar[str] = ""

    def config(self, job: Job, scheme: str, skips: tuple[str, ...]) -> Any:
        """Return the ``quantization_config`` that requests a scheme from transformers.

        Args:
            job: the load; ``job.spec`` holds what the test requests.
            scheme: one of the names in ``schemes``.
            skips: modules to leave dense, transformers' own defaults among them; empty if the test names none.

        Raises NotImplementedError, in one sentence, if the installed library cannot quantise while loading.
        """
        raise NotImplementedError(f"{self.name} does not quantise while a model is loaded")

    def keep_offloaded_dense(self, job: Job, config: Any) -> None:
        """Change a ``quantization_config`` so that the weights that a map puts on the CPU or the disk are kept dense.

        Called only if the map of a load does so. For a library that refuses such a map otherwise; by default nothing is
        changed.
        """

    @classmethod
    def is_installed(cls) -> bool:
        """Return true if the packages that it needs in addition to transformers are installed."""
        return all(map(is_installed, cls.packages))

    def predicted(self) -> AbstractContextManager[None]:
        """Return a context in which the imported library allocates as it does on a GPU, on fake tensors.

        The process has a torch without CUDA. By default nothing is changed: the library calls operators of torch only.
        Raises NotImplementedError, in one sentence, if the installed release cannot be traced.
        """
        return nullcontext()

    def read(self, module: Any) -> Iterable[Stored]:
        """Return the quantised weights that a module holds itself, wherever the library keeps them."""
        return ()

    def described(self, config: Mapping[str, Any]) -> FileFormat | None:
        """Return the content of a checkpoint's ``quantization_config``; None if it does not belong to this method."""
        method = str(config.get("quant_method", "unknown"))
        if method not in self.file_methods:
            return None
        return FileFormat(method, describe_config(config), skips=named_skips(config), config=config)

    def in_file(self, tensors: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> Stored | None:
        """Return the weight ``name`` of a module as a checkpoint's file holds it.

        Args:
            tensors: lazy slices of the file, by the names that they have in the module.
            name: the weight's name in the dense module, ``weight`` for a Linear.
            config: the checkpoint's ``quantization_config``.

        None if the file does not hold the weight in this format.
        """
        return None

    def planned(self, module: Any, weight: Any, *, replaced: bool, config: Any) -> dict[str, int] | None:
        """Return the storages that it makes of a weight, as suffix of the weight's name -> bytes; None for a dense one.

        None for a weight that is ``replaced`` means that its bytes are unknown: then nothing is predicted of the load.

        Args:
            module: the module on the meta device, replaced as transformers' quantiser would.
            weight: its weight, not quantised yet.
            replaced: whether transformers' quantiser says that it will quantise this weight.
            config: the load's ``quantization_config``.
        """
        return None

    def why_dense(self, module: Any) -> str:
        """Return why a module of a type that it makes, or would replace, holds a dense weight; empty if unknown."""
        return ""

    def hint(self, place: str, device: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Return what the user can do about an exception; empty if its cause is unknown.

        Args:
            place: the innermost file and line outside torch, as ``bitsandbytes/functional.py:1696``.
            device: ``cpu`` or ``cuda``.
            shapes: the shapes of the quantised weights, by name.
        """
        return ""


#: Entries of a ``quantization_config`` that are worth showing, and their names in the text.
_TOLD = {
    "bits": "{} bit",
    "w_bit": "{} bit",
    "fmt": "{}",
    "format": "{}",
    "quant_type": "{}",
    "group_size": "group={}",
    "q_group_size": "group={}",
    "weight_block_size": "block={}",
    "version": "{}",
    "desc_act": "act-order",
    "activation_scheme": "activations={}",
}
#: Entries that name modules which were left dense.
_SKIPS = ("llm_int8_skip_modules", "modules_to_not_convert", "ignore", "ignored_layers")


def named_skips(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modules that a ``quantization_config`` says were left dense."""
    return tuple(str(name) for key in _SKIPS for name in config.get(key) or ())


def describe_config(config: Mapping[str, Any]) -> str:
    """Return a ``quantization_config`` in a few words, by the entries that the tools write."""
    return " ".join([str(config.get("quant_method", "unknown")), *_told(config)])


def _told(config: Mapping[str, Any]) -> Iterator[str]:
    for key, text in _TOLD.items():
        value = config.get(key)
        if isinstance(value, dict):
            continue
        if value not in (None, False, "", []):
            yield text.format("x".join(map(str, value)) if isinstance(value, list) else value)
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            size = weights.get("group_size")
            yield f"{weights.get('type', 'int')}{weights.get('num_bits', '')}" + (f" group={size}" if size else "")


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Return the shape of a tensor, or of a lazy slice of a file."""
    return tuple(tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape)


def dtype_name(tensor: Any) -> str:
    """Return torch's name of a tensor's dtype: ``bfloat16``."""
    return str(tensor.dtype).removeprefix("torch.")
