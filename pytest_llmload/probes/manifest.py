"""The modules that the model consists of: one row for all modules that are alike."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from pytest_llmload.core.results import LoadResult, ManifestRow
from pytest_llmload.core.units import counted, format_change, format_ranges
from pytest_llmload.probes.base import Probe
from pytest_llmload.worker.checkpoints.quantisation_config import read_format
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.tensors import BUFFER, PARAMETER, Held, Inventory, is_packed


class Manifest(Probe):
    """Fills ``manifest`` before the first forward; what the forward changed is added to ``notes``."""

    def loaded(self, loaded: Loaded) -> None:
        found = read_format(self.job.checkpoint.path)
        self.packed = found.description if found is not None else ""
        self.rows = manifest(loaded.inventory, self.packed)
        self.after: list[ManifestRow] | None = None

    def forwarded(self, loaded: Loaded) -> None:
        self.after = manifest(Inventory(loaded.model), self.packed)

    def fill(self, result: LoadResult) -> None:
        result.manifest = self.rows
        result.notes += _changes(self.rows, self.after or self.rows)


def _changes(before: list[ManifestRow], after: list[ManifestRow]) -> list[str]:
    """Return what a forward changed in the modules: one sentence for all modules with the same change."""
    old_rows = {(row.module, row.indices): row for row in before}
    alike: dict[str, list[tuple[ManifestRow, int]]] = defaultdict(list)
    for row in after:
        old = old_rows.get((row.module, row.indices))
        if old is not None and old != row:
            changed = [
                f"{name} {getattr(old, name) or 'none'} -> {getattr(row, name) or 'none'}"
                for name in ("cls", "dtype", "device", "quant")
                if getattr(old, name) != getattr(row, name)
            ]
            alike[", ".join(changed) or "bytes"].append((row, row.bytes - old.bytes))
    return [
        f"the first forward changed {counted(sum(row.count for row, _ in rows), 'module')} ({rows[0][0].module}"
        f"{' …' if len(rows) > 1 else ''}): "
        f"{text} ({format_change(sum(size for _, size in rows), 'B')})"
        for text, rows in alike.items()
    ]


def manifest(inventory: Inventory, packed: str = "") -> list[ManifestRow]:
    """Return one row for all modules whose paths differ in their first number only, and that are otherwise alike.

    ``packed`` is how the checkpoint says that it is quantised; it describes modules that hold a weight in a form whose
    state this package cannot read.
    """
    owned: dict[str, list[Held]] = defaultdict(list)
    for held in inventory.held:
        owned[held.module].append(held)
    groups: dict[tuple[str, str, str, str, str, int], list[int | None]] = defaultdict(list)
    for path, tensors in owned.items():
        module = inventory.modules[path]
        pattern, number = starred(path)
        own = [held for held in tensors if held.role == PARAMETER] or [held for held in tensors if held.role == BUFFER]
        states = inventory.stored_weights(path)
        unknown = packed if not states and is_packed(tensors) else ""
        key = (
            pattern,
            type(module).__name__,
            _joined(held.dtype for held in own or tensors),
            _joined(held.device for held in own or tensors),
            _joined(state.describe() for state in states) or unknown,
            sum({_identity(held): held.nbytes for held in tensors}.values()),
        )
        groups[key].append(number)
    rows = [
        ManifestRow(
            module=pattern,
            indices=format_ranges(number for number in numbers if number is not None),
            cls=cls,
            dtype=dtype,
            device=device,
            quant=quant,
            count=len(numbers),
            bytes=size * len(numbers),
        )
        for (pattern, cls, dtype, device, quant, size), numbers in groups.items()
    ]
    return sorted(rows, key=lambda row: (row.module, row.indices))


def _identity(held: Held) -> object:
    """Return a key that is equal for two names of one tensor (int8 keeps values in ``weight`` and ``weight.CB``)."""
    if held.tensor is None or held.device == "meta":
        return held.name
    return held.tensor.data_ptr(), held.nbytes


def _joined(values: Iterable[str]) -> str:
    return "+".join(sorted(set(values)))


def starred(path: str) -> tuple[str, int | None]:
    """Return a path with its first number replaced by a star, and the number; None if the path has no number.

    ``model.layers.7.mlp`` gives (``model.layers.*.mlp``, 7).
    """
    match = re.search(r"(?:^|(?<=\.))(\d+)(?=\.|$)", path)
    if match is None:
        return path, None
    return f"{path[: match.start()]}*{path[match.end() :]}", int(match[1])
