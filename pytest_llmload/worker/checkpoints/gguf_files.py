"""Files of llama.cpp as models: transformers makes all their weights dense while it loads them.

A GGUF file holds the config and the tokenizer too. A folder in the cache gives them their usual names beside a link to
the file, so that everything that reads a checkpoint's folder reads this one; its tensors go by transformers' names.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pytest_llmload.core.canonical import digest
from pytest_llmload.core.errors import LoadFailed, RequirementMissing
from pytest_llmload.core.units import format_bytes
from pytest_llmload.worker.checkpoints.architecture import meta_model
from pytest_llmload.worker.checkpoints.build import write_json, write_once
from pytest_llmload.worker.checkpoints.headers import Tensor
from pytest_llmload.worker.checkpoints.pickled import Slice


def in_folder(directory: Path) -> list[Path]:
    """Return the GGUF files of a folder, sorted."""
    return sorted(path for path in directory.glob("*.gguf") if path.is_file())


def only_file(directory: Path) -> Path | None:
    """Return the GGUF file that a folder of :func:`adopted` links to; None for any other checkpoint."""
    files = in_folder(directory)
    return files[0] if len(files) == 1 and (directory / _MARK).is_file() else None


#: The file that only a folder of :func:`adopted` has.
_MARK = "gguf_types.json"


def adopted(file: Path, cache_dir: Path) -> Path:
    """Return a folder in ``cache_dir`` with a link to a GGUF file, and its config and tokenizer as files beside it.

    Raises RequirementMissing where the package ``gguf`` is not installed, LoadFailed where the file cannot be read or
    transformers does not know its architecture; each in one sentence.
    """
    status = file.stat()
    target = cache_dir / "single-files" / digest([str(file), status.st_size, status.st_mtime_ns], 16) / file.stem

    def write(folder: Path) -> None:
        import transformers

        reader = _reader(file)
        try:
            config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        except (ValueError, KeyError, OSError) as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise LoadFailed(f"transformers {transformers.__version__} does not load {file}: {first}") from error
        write_json(folder / "config.json", config.to_dict())
        types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
        write_json(folder / _MARK, dict(types.most_common()))
        (folder / file.name).symlink_to(file)
        try:
            transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        except Exception:  # noqa: BLE001 - many files have no tokenizer that converts, and a load needs none
            return

    write_once(target, write)
    return target


def described(file: Path) -> str:
    """Return the types of a file's tensors and their bytes: ``13 x Q4_0, 5 x F32, 180.00 KiB in the file``."""
    content = _content(file)
    types = ", ".join(f"{count} x {name}" for name, count in content.types.most_common())
    return f"{types}, {format_bytes(content.bytes)} in the file"


def tensors_in(file: Path) -> list[Tensor]:
    """Return the tensors that transformers makes of a file in a folder of :func:`adopted`, by its names, in fp32."""
    return [Tensor(name, each.shape, "F32") for name, each in _content(file).tensors.items()]


class GgufTensors:
    """A GGUF file's tensors by transformers' names, each read when it is asked for."""

    def __init__(self, file: Path) -> None:
        content = _content(file)
        self._tensors = content.tensors
        #: True if every tensor of the file is one of the model's; some kinds of experts are divided while loading.
        self.is_whole = content.is_whole
        #: The name and the slice that were asked for last: a check reads some ten blocks of one tensor after the other.
        self._last: tuple[str, Slice] | None = None

    def get_slice(self, name: str) -> Slice:
        """Return a tensor as transformers loads it, dequantised, with the methods of a lazy slice."""
        if self._last is None or self._last[0] != name:
            # Released first, so that one dense tensor is in memory, not two.
            self._last = None
            self._last = name, Slice(self._tensors[name].dense())
        return self._last[1]


@dataclass(frozen=True)
class _Content:
    """What a GGUF file holds."""

    #: transformers' name -> the tensor; experts as it joins them, where the file keeps each layer's together.
    tensors: dict[str, _Quantised]
    is_whole: bool
    #: Type of a tensor -> how many of the file are of it.
    types: Counter[str]
    #: Bytes of all its tensors.
    bytes: int


def _content(file: Path) -> _Content:
    status = file.stat()
    return _read(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _read(file: Path, size: int, changed: int) -> _Content:
    """Read what a file holds, once as long as it does not change: its package reads the tokenizer with it, which takes
    some 0.1 ms for each token of the vocabulary.
    """
    from transformers import modeling_gguf_pytorch_utils as library

    reader = _reader(file)
    model = meta_model(file.parent)
    parsed = library.load_gguf_checkpoint(str(file))
    architecture = library.read_field(reader, "general.architecture")[0]
    make = library.TENSOR_PROCESSORS.get(architecture, library.TensorProcessor)
    processor = make(config=parsed["config"])
    names = library.get_gguf_hf_weights_map(model, processor)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    parts: dict[str, list[_Part]] = {}
    tensors: dict[str, _Quantised] = {}
    is_whole = True
    for tensor in reader.tensors:
        name = names.get(tensor.name, names.get(tensor.name.removesuffix(".weight")))
        if name in shapes:
            parts.setdefault(name, []).append(_Part.of(file, tensor))
        else:
            is_whole = False
    for name, found in parts.items():
        shape = shapes[name]
        if sum(part.elements for part in found) == math.prod(shape):
            tensors[name] = _Quantised(found, processor, shape)
        else:
            is_whole = False
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    return _Content(tensors, is_whole, types, sum(int(tensor.n_bytes) for tensor in reader.tensors))


@dataclass(frozen=True)
class _Part:
    """One tensor of a file: its place there. The file itself is not kept open, which would keep its pages mapped."""

    file: Path
    name: str
    type: Any
    elements: int
    offset: int
    #: Of its bytes, as the package ``gguf`` reads them.
    dtype: Any
    shape: tuple[int, ...]

    @classmethod
    def of(cls, file: Path, tensor: Any) -> _Part:
        data = tensor.data
        return cls(
            file,
            tensor.name,
            tensor.tensor_type,
            int(tensor.n_elements),
            int(tensor.data_offset),
            data.dtype,
            tuple(data.shape),
        )

    def values(self) -> Any:
        """Return its values, dequantised."""
        import numpy
        from gguf import dequantize

        stored = numpy.fromfile(self.file, self.dtype, math.prod(self.shape), offset=self.offset)
        return dequantize(stored.reshape(self.shape), self.type)


class _Quantised:
    """One tensor of a model, of one or several of a file, and how transformers reorders them.

    Of experts, what gates and what goes up is one tensor, gates first (``Qwen2MoeTensorProcessor``).
    """

    def __init__(self, parts: list[_Part], processor: Any, shape: tuple[int, ...]) -> None:
        self._parts = sorted(parts, key=lambda part: "gate" not in part.name)
        self._processor, self.shape = processor, shape

    def dense(self) -> Any:
        import numpy
        import torch

        made = [torch.from_numpy(numpy.copy(self._processed(part))) for part in self._parts]
        return (made[0] if len(made) == 1 else torch.cat(made, dim=1)).reshape(self.shape)

    def _processed(self, part: _Part) -> Any:
        return self._processor.process(
            weights=part.values(), name=part.name, tensor_key_mapping={}, parsed_parameters={}
        ).weights


def _reader(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise RequirementMissing(f"{file} needs gguf, not installed: pip install gguf") from None
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, OSError) as error:
        raise LoadFailed(f"{file} is not a readable GGUF file: {error}") from error
