"""Baseline files in their folder: where each stands, and writing them so that nothing is lost.

``<root>/<model>/<device>/<slug>.json``; with ``--llm-baseline-variant NAME``,
``<root>/<model>/<device>/<NAME>/<slug>.json``. The variant's level is inside the device's folder because there, and
only there, every other name ends in ``.json``: it can collide with no model, device or slug.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from pytest_llmload.baselines.codec import dumps, loads
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.core.errors import BaselineError
from pytest_llmload.system.files import replace_text

SUFFIX = ".json"
#: Seconds to wait for another run that writes the same file; a write takes milliseconds.
LOCK_TIMEOUT = 60.0
_POLL = 0.01
#: Longest file name that common file systems take, in bytes.
_LONGEST = 255
#: Bytes that a disk must have left for a baseline; most are smaller.
_ROOM = 1 << 16


@dataclass(frozen=True)
class Entry:
    """One baseline file that exists."""

    model: str
    device: str
    slug: str
    path: Path


class Store:
    """The baselines under one root folder, at one variant's level."""

    def __init__(self, root: Path, variant_level: str | None = None, *, locks: Path | None = None) -> None:
        """``locks`` is the folder of the lock files, by default one in the user's temporary folder.

        Raises ValueError for a variant's name that is no plain folder name.
        """
        if variant_level is not None:
            component(variant_level, "baseline variant")
            if variant_level.endswith(SUFFIX):
                raise ValueError(f"the baseline variant {variant_level!r} must not end in {SUFFIX}")
        self.root = root
        self.variant_level = variant_level
        self._locks = locks

    def path_for(self, model: str, device: str, slug: str) -> Path:
        """Where the baseline of a load stands. Raises ValueError for a name that would lead elsewhere."""
        folder = self._level(self.root / component(model, "model name") / component(device, "device"))
        return folder / component(f"{component(slug, 'variant')}{SUFFIX}", "variant")

    def read(self, path: Path) -> Baseline | None:
        """The baseline in a file, None where there is no file. Raises BaselineError."""
        try:
            return loads(path.read_text(encoding="utf-8"), str(path))
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            raise BaselineError(
                f"{path} is not UTF-8 text: restore it from version control, or delete it and record it again"
            ) from None
        except OSError as error:
            raise BaselineError(f"cannot read {path}: {error.strerror or error}") from None

    def update(self, path: Path, change: Callable[[Baseline | None], Baseline | None]) -> bool:
        """Replace a file by what ``change`` makes of its present content; say whether it was written.

        Runs that write at once wait for each other, and ``change`` sees what the other wrote. Where it gives back
        what it was given, or None, the file is not touched. Raises BaselineError; the file is then as it was.
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
        """Raise BaselineError where a baseline could not be written to ``path``; leaves nothing behind.

        For whoever is about to load a model only to record it.
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

    def entries(self, device: str | None = None) -> Iterator[Entry]:
        """Every baseline file of this variant's level, sorted; only those of ``device`` where it is given."""
        for folder in sorted(self.root.glob("*/*")):
            if device is not None and folder.name != device:
                continue
            for path in sorted(self._level(folder).glob(f"*{SUFFIX}")):
                yield Entry(folder.parent.name, folder.name, path.name.removesuffix(SUFFIX), path)

    def devices(self, model: str, slug: str) -> list[str]:
        """The devices for which this load has a baseline: what to tell somebody whose device has none."""
        return [entry.device for entry in self.entries() if (entry.model, entry.slug) == (model, slug)]

    def _level(self, folder: Path) -> Path:
        return folder / self.variant_level if self.variant_level is not None else folder

    @contextlib.contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        # Not beside the baseline: the folder is committed and holds nothing but baselines.
        folder = self._locks or own_lock_folder()
        name = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:32]
        lock = FileLock(folder / f"{name}.lock", timeout=LOCK_TIMEOUT)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock.acquire(poll_interval=_POLL)
        except Timeout:
            raise BaselineError(
                f"cannot write {path}: another run has been writing it for {LOCK_TIMEOUT:g} s ({lock.lock_file})"
            ) from None
        except OSError as error:
            raise BaselineError(f"cannot lock {path} with {lock.lock_file}: {error.strerror or error}") from None
        try:
            yield
        finally:
            lock.release()


def own_lock_folder() -> Path:
    """This user's folder for lock files: every run of the user on this machine finds the same."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"pytest-llmload-{user}" / "locks"


def component(name: str, what: str) -> str:
    """``name`` if it is good for one file or folder name, else ValueError."""
    if not name or name in (".", "..") or any(char in "/\\" or not char.isprintable() for char in name):
        raise ValueError(f"{name!r} cannot be a {what}: it has to be one plain file name, without '/' and not '..'")
    if len(name.encode()) > _LONGEST:
        raise ValueError(f"the {what} {name[:40]!r}... is too long for a file name: {len(name.encode())} bytes")
    return name
