"""Files of llama.cpp as models: transformers makes all their weights dense while it loads them.

A GGUF file holds the config and the tokenizer too. A folder in the cache gives them their usual names beside a link to
the file, so that everything that reads a checkpoint's folder reads this one; its tensors go by transformers' names.
"""

from __future__ import annotations

import math
from collections import Counter
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
    reader = _reader(file)
    status = file.stat()
    target = cache_dir / "single-files" / digest([str(file), status.st_size, status.st_mtime_ns], 16) / file.stem

    def write(folder: Path) -> None:
        import transformers

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
    tensors = _reader(file).tensors
    types = Counter(tensor.tensor_type.name for tensor in tensors).most_common()
    size = format_bytes(sum(int(tensor.n_bytes) for tensor in tensors))
    return f"{', '.join(f'{count} x {name}' for name, count in types)}, {size} in the file"


def tensors_in(file: Path) -> list[Tensor]:
    """Return the tensors that transformers makes of a file in a folder of :func:`adopted`, by its names, in fp32."""
    return [Tensor(name, each.shape, "F32") for name, each in GgufTensors(file).tensors.items()]


class GgufTensors:
    """A GGUF file's tensors by transformers' names; experts as it joins them, where it keeps each layer's together."""

    def __init__(self, file: Path) -> None:
        from transformers import modeling_gguf_pytorch_utils as library

        reader = _reader(file)
        model = meta_model(file.parent)
        parsed = library.load_gguf_checkpoint(str(file))
        architecture = library.read_field(reader, "general.architecture")[0]
        make = library.TENSOR_PROCESSORS.get(architecture, library.TensorProcessor)
        processor = make(config=parsed["config"])
        names = library.get_gguf_hf_weights_map(model, processor)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        #: transformers' name -> the tensor.
        self.tensors: dict[str, _Quantised] = {}
        #: True if every tensor of the file is one of the model's; some kinds of experts are divided while loading.
        self.is_whole = True
        #: The name and the slice that were asked for last: a check reads some ten blocks of one tensor after the other.
        self._last: tuple[str, Slice] | None = None
        parts: dict[str, list[Any]] = {}
        for tensor in reader.tensors:
            name = names.get(tensor.name, names.get(tensor.name.removesuffix(".weight")))
            if name in shapes:
                parts.setdefault(name, []).append(tensor)
            else:
                self.is_whole = False
        for name, found in parts.items():
            shape = shapes[name]
            if sum(int(tensor.n_elements) for tensor in found) == math.prod(shape):
                self.tensors[name] = _Quantised(found, processor, shape)
            else:
                self.is_whole = False

    def get_slice(self, name: str) -> Slice:
        """Return a tensor as transformers loads it, dequantised, with the methods of a lazy slice."""
        if self._last is None or self._last[0] != name:
            # Released first, so that one dense tensor is in memory, not two.
            self._last = None
            self._last = name, Slice(self.tensors[name].dense())
        return self._last[1]


class _Quantised:
    """One tensor of a model, of one or several of a file, and how transformers reorders them.

    Of experts, what gates and what goes up is one tensor, gates first (``Qwen2MoeTensorProcessor``).
    """

    def __init__(self, tensors: list[Any], processor: Any, shape: tuple[int, ...]) -> None:
        self._tensors = sorted(tensors, key=lambda tensor: "gate" not in tensor.name)
        self._processor, self.shape = processor, shape

    def dense(self) -> Any:
        import numpy
        import torch

        made = [torch.from_numpy(numpy.copy(self._processed(tensor))) for tensor in self._tensors]
        return (made[0] if len(made) == 1 else torch.cat(made, dim=1)).reshape(self.shape)

    def _processed(self, tensor: Any) -> Any:
        import numpy
        from gguf import dequantize

        # Not as a memmap, which numpy makes anew for each group of rows.
        values = dequantize(numpy.asarray(tensor.data), tensor.tensor_type)
        return self._processor.process(
            weights=values, name=tensor.name, tensor_key_mapping={}, parsed_parameters={}
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
