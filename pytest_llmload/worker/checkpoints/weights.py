"""Find a folder's weight files as transformers does, and list their tensors: safetensors, pickled files or one GGUF."""

from __future__ import annotations

from pathlib import Path

from pytest_llmload.core.errors import LoadFailed
from pytest_llmload.core.units import counted, plural
from pytest_llmload.worker.checkpoints import gguf_files, pickled
from pytest_llmload.worker.checkpoints.headers import INDEX, WEIGHTS, Tensor, read_header, read_index

#: The names of a whole file and of an index of its parts, in transformers' order.
_KINDS = ((WEIGHTS, INDEX), (pickled.WEIGHTS, pickled.INDEX))
#: Suffixes of files with weights that transformers does not load from a folder.
_OTHERS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz")

#: The files of torch's distributed checkpoints, as FSDP writes them.
_PART = "*.distcp"


class NoWeights(LoadFailed):
    """The folder has no weights that transformers would load; code of the user's may load others."""


def weight_files(directory: Path) -> list[Path]:
    """Return the files that a load of ``directory`` reads, sorted.

    Raises NoWeights, with one sentence, if there are none, and LoadFailed if an index names files that are missing.
    """
    for whole, index in _KINDS:
        if (directory / whole).is_file():
            return [directory / whole]
        if (directory / index).is_file():
            return _indexed(directory / index)
    if len(files := gguf_files.in_folder(directory)) == 1:
        return files
    raise NoWeights(_without(directory))


def _indexed(index: Path) -> list[Path]:
    names = sorted(set(read_index(index).values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise LoadFailed(
            f"{index} names {counted(len(names), 'file')} of which {len(missing)} {plural(len(missing), 'is', 'are')} "
            f"missing: {', '.join(missing)}"
        )
    return [index.parent / name for name in names]


def _without(directory: Path) -> str:
    """Return what is wrong with a folder without weights that transformers would load, and what to do."""
    none = f"{directory} has no {WEIGHTS} and no {INDEX}"
    found = sorted(path.name for path in directory.iterdir() if path.suffix in _OTHERS and path.is_file())
    ggufs = [name for name in found if name.endswith(".gguf")]
    # torch writes one of a model that is split over processes, in the folder or in one below it.
    if parts := sorted(
        str(path.relative_to(directory)) for path in (*directory.glob(_PART), *directory.glob(f"*/{_PART}"))
    ):
        return (
            f"{none}, but {counted(len(parts), 'part')} of a distributed checkpoint ({parts[0]}): merge them with "
            "accelerate merge-weights, or load them in a loader of your own: "
            "strategy('loader', target='module:function')"
        )
    if not found:
        return f"{none}, so it contains no weights"
    if ggufs == found:
        return f"{directory} has {counted(len(ggufs), 'GGUF file')}; name one of them as the model: {', '.join(ggufs)}"
    return (
        f"{none}, but {', '.join(found[:4])}{' …' if len(found) > 4 else ''}: give a folder that has the files to load "
        f"under their plain names ({WEIGHTS}), or load them in a loader of your own: "
        "strategy('loader', target='module:function')"
    )


def read_tensors(directory: Path) -> list[Tensor]:
    """Return all tensors of a checkpoint by the model's names, sorted; those of a GGUF file as they will be loaded.

    Raises NoWeights and LoadFailed as :func:`weight_files`, and LoadFailed where a file is damaged or an index names a
    file that does not contain the tensor.
    """
    files = weight_files(directory)
    held = {path.name: tensors_in(path) for path in files}
    index = next((path for _, name in _KINDS if (path := files[0].parent / name).is_file()), None)
    if index is not None and files[0].name not in (WEIGHTS, pickled.WEIGHTS):
        found = {(tensor.name, file) for file, tensors in held.items() for tensor in tensors}
        if wrong := sorted(set(read_index(index).items()) - found):
            name, file = wrong[0]
            more = f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
            raise LoadFailed(f"{index} says that {name} is in {file}, which does not contain it{more}")
    every = sorted((tensor for tensors in held.values() for tensor in tensors), key=lambda tensor: tensor.name)
    weights = [tensor for tensor in every if tensor.name.endswith("weight")]
    if weights and all(0 in tensor.shape for tensor in weights):
        first = weights[0]
        raise LoadFailed(
            f"{directory} contains no values: its weights have no elements ({first.name} is {list(first.shape)}). "
            "save_pretrained writes such files for a model that DeepSpeed ZeRO-3 has partitioned; save it with "
            "stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py on the checkpoint"
        )
    return every


def tensors_in(file: Path) -> list[Tensor]:
    """Return the tensors of one weight file. Raises LoadFailed, with one sentence, if it cannot be read."""
    if file.suffix == ".gguf":
        return gguf_files.tensors_in(file)
    if file.suffix == ".bin":
        return [tensor for tensor, _ in pickled.read(file)]
    return [stored.tensor for stored in read_header(file)]
