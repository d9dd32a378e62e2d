"""Read single blocks of a checkpoint's tensors; of safetensors and pickled files without reading whole tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pytest_llmload.worker.checkpoints import pickled
from pytest_llmload.worker.checkpoints.gguf_files import GgufTensors
from pytest_llmload.worker.checkpoints.quantisation_config import read_format
from pytest_llmload.worker.checkpoints.weights import NoWeights, tensors_in, weight_files


class CheckpointFiles:
    """A checkpoint's weight files; one block of one tensor at a time."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._files: dict[str, Any] = {}
        #: Why the values of some or all tensors cannot be read from the files; empty if they can.
        self.unread = ""
        #: Tensor name -> the file that contains it, found as the library does, by the index if there is one.
        self.where: dict[str, Path] = {}
        try:
            files = weight_files(Path(path))
        except NoWeights as error:
            # Only a user's own loader gets here.
            self.unread = str(error)
            return
        self.where = {tensor.name: file for file in files for tensor in tensors_in(file)}
        if files[0].suffix == ".gguf" and not self._open(files[0]).is_whole:
            self.unread = f"transformers joins or divides tensors of {files[0].name} while loading"

    def _open(self, file: Path) -> Any:
        if str(file) not in self._files:
            if file.suffix == ".gguf":
                self._files[str(file)] = GgufTensors(file)
            elif file.suffix == ".bin":
                self._files[str(file)] = pickled.PickledFile(file)
            else:
                self._files[str(file)] = safe_open(str(file), framework="pt", device="cpu")
        return self._files[str(file)]

    @cached_property
    def are_quantised(self) -> bool:
        """Return whether the checkpoint's config says that it is quantised, so that narrow types are codes."""
        return (self._path / "config.json").is_file() and read_format(self._path) is not None

    def find(self, name: str, prefix: str = "") -> str | None:
        """Return the file's name of the model's tensor ``name``; None if the file does not contain it as such.

        ``prefix`` is the model's ``base_model_prefix``: files may have been saved with or without it.
        """
        candidates = [name, name.removeprefix(f"{prefix}.")] + ([f"{prefix}.{name}"] if prefix else [])
        return next((candidate for candidate in candidates if candidate in self.where), None)

    def slice(self, name: str) -> Any:
        """Return a tensor with ``get_shape()``, ``get_dtype()`` and slicing, which reads only the slice if it can."""
        return self._open(self.where[name]).get_slice(name)

    def block(self, name: str, start: int, stop: int, transposed: bool = False) -> Any:
        """Return elements ``start`` to ``stop``, in row order, of a tensor or its transpose, in the file's dtype."""
        return next(self.blocks(name, [(start, stop)], transposed))

    def blocks(self, name: str, places: Iterable[tuple[int, int]], transposed: bool = False) -> Iterator[Any]:
        """Yield elements as :meth:`block` does, for each pair of a start and a stop."""
        # Mapped, not read.
        whole = self.slice(name)[...]
        return blocks(whole.T if transposed else whole, places)


def blocks(tensor: Any, places: Iterable[tuple[int, int]]) -> Iterator[Any]:
    """Yield elements of a tensor, row by row, for each pair of a start and a stop.

    What is not contiguous is not copied as a whole.
    """
    if tensor.is_contiguous():
        elements = tensor.reshape(-1)
        yield from (elements[start:stop] for start, stop in places)
        return
    row = tensor[0].numel()
    for start, stop in places:
        first, last = start // row, -(-stop // row)
        yield tensor[first:last].reshape(-1)[start - first * row : stop - first * row]
