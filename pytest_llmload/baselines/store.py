"""Find, read and write the baseline files of a folder, so that no content is lost.

``<root>/<model>/<device>/<slug>.json``; with ``--llm-baseline-variant NAME``,
``<root>/<model>/<device>/<NAME>/<slug>.json``. The variant's level is inside the device's folder because there, and
only there, every other name ends in ``.json``: it cannot collide with a model, device or slug.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pytest_llmload.baselines.codec import LARGEST, dumps, loads
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.core.errors import BaselineError
from pytest_llmload.system.files import replace_text
from pytest_llmload.system.locks import folder_lock

SUFFIX = ".json"
#: Seconds to wait for a different run that writes the same file; a write takes milliseconds.
LOCK_TIMEOUT = 60.0
#: Longest file name that common file systems take, in bytes.
_LONGEST = 255
#: Bytes that the disk must have free for a baseline; most baselines are smaller.
_ROOM = 1 << 16


@dataclass(frozen=True)
class BaselineFile:
    """One baseline file that exists."""

    model: str
    device: str
    slug: str
    path: Path


class Store:
    """The baselines under one root folder, at one variant's level."""

    def __init__(self, root: Path, variant_level: str | None = None) -> None:
        """Use the baselines under ``root``. Raises ValueError for a variant's name that is not a plain folder name."""
        if variant_level is not None:
            component(variant_level, "baseline variant")
            if variant_level.endswith(SUFFIX):
                raise ValueError(f"the baseline variant {variant_level!r} must not end in {SUFFIX}")
        self.root = root
        self.variant_level = variant_level

    def path_for(self, model: str, device: str, slug: str) -> Path:
        """Return the path of a load's baseline. Raises ValueError for a name that would lead outside its folder."""
        folder = self._level(self.root / component(model, "model name") / component(device, "device"))
        return folder / component(f"{component(slug, 'variant')}{SUFFIX}", "variant")

    def read(self, path: Path) -> Baseline | None:
        """Return the baseline in a file, or None if the file does not exist. Raises BaselineError."""
        try:
            return loads(_read(path), str(path))
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            raise BaselineError(
                f"{path} is not UTF-8 text: restore it from version control, or delete it and record it again"
            ) from None
        except OSError as error:
            raise BaselineError(f"cannot read {path}: {error.strerror or error}") from None

    def update(self, path: Path, change: Callable[[Baseline | None], Baseline | None]) -> bool:
        """Replace a file by what ``change`` makes of its present content; return whether it was written.

        Runs that write at the same time wait for each other, and ``change`` gets what the other run wrote. If it
        returns its argument, or None, the file is not touched. Raises BaselineError; the file is then unchanged.
        """
        with self._lock(path):
            old = self.read(path)
            new = change(old)
            if new is None or new == old:
                return False
            try:
                replace_text(path, dumps(new))
            except OSError as error:
                raise BaselineError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from None
            return True

    def check_writable(self, path: Path) -> None:
        """Raise BaselineError if a baseline could not be written to ``path``; leave nothing behind.

        Callers use this before they load a model only to record it.
        """
        folder = path.parent
        while not folder.exists():
            folder = folder.parent
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(_ROOM))
                file.flush()
        except OSError as error:
            raise BaselineError(
                f"cannot record {path}: {error.strerror or error} in {folder}; nothing was loaded for it"
            ) from None

    def entries(self, device: str | None = None) -> Iterator[BaselineFile]:
        """Yield every baseline file of this variant's level, sorted; only those of ``device`` if it is given."""
        for folder in sorted(self.root.glob("*/*")):
            if device is not None and folder.name != device:
                continue
            for path in sorted(self._level(folder).glob(f"*{SUFFIX}")):
                yield BaselineFile(folder.parent.name, folder.name, path.name.removesuffix(SUFFIX), path)

    def devices(self, model: str, slug: str) -> list[str]:
        """Return the devices for which this load has a baseline; messages name them if the run's device has none."""
        found = (entry for entry in self.entries() if (entry.model, entry.slug) == (model, slug))
        # A link to a file that was not fetched holds nothing.
        return [entry.device for entry in found if entry.path.exists()]

    def _level(self, folder: Path) -> Path:
        return folder / self.variant_level if self.variant_level is not None else folder

    @contextlib.contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        """Lock the folder of a baseline: the folder of the target if the path is a link."""
        folder = Path(os.path.realpath(path)).parent
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(folder_lock(folder, LOCK_TIMEOUT))
            except TimeoutError:
                raise BaselineError(
                    f"cannot write {path}: other runs have been writing in {folder} for {LOCK_TIMEOUT:g} s"
                ) from None
            except OSError as error:
                raise BaselineError(f"cannot lock {folder} to write {path}: {error.strerror or error}") from None
            yield


def _read(path: Path) -> str:
    """Return a file's text. Raises OSError, and BaselineError unless it is a regular file of a baseline's size."""
    # Without O_NONBLOCK, opening a FIFO would wait until another process writes to it.
    with open(path, encoding="utf-8", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise BaselineError(f"{path} is not a regular file: delete it, and record the baseline again")
        if found.st_size > LARGEST:
            raise BaselineError(
                f"{path} has {found.st_size} bytes, but a baseline has at most {LARGEST}: restore it from version "
                "control, or delete it and record it again"
            )
        return file.read()


def component(name: str, what: str) -> str:
    """Return ``name`` if it is valid as one file or folder name, else raise ValueError; ``what`` is what it names."""
    if not name or name in (".", "..") or any(char in "/\\" or not char.isprintable() for char in name):
        raise ValueError(f"{name!r} cannot be a {what}: it must be one plain file name, without '/' and not '..'")
    if len(name.encode()) > _LONGEST:
        raise ValueError(f"the {what} {name[:40]!r}... is too long for a file name: {len(name.encode())} bytes")
    return name
