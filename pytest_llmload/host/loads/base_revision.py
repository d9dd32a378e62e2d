"""The user's code as it was at a different git revision, next to the working tree."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

from pytest_llmload.core.errors import MachineError
from pytest_llmload.system.scratch import LOAD, Scratch


class BaseRevision:
    """The files of one revision in their own folder; the repository and its working tree stay as they are.

    Raises MachineError if the folder is not in a repository or the revision does not exist.
    """

    def __init__(self, root: Path, revision: str) -> None:
        self.top = Path(_git(root, "rev-parse", "--show-toplevel").decode().strip())
        archive = _git(self.top, "archive", "--format=tar", revision)
        self._scratch = Scratch(LOAD)
        self.files = Path(self._scratch.files)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(self.files, filter="data")

    def path(self, path: str) -> str:
        """Return where a path of the working tree is at the revision; any other path as it is."""
        real = Path(path)
        return str(self.files / real.relative_to(self.top)) if real.is_relative_to(self.top) else path

    def variables(self, paths: tuple[str, ...]) -> dict[str, str]:
        """Return environment variables that put the revision's folders before those that an installation names."""
        own = [self.path(path) for path in paths if self.path(path) != path]
        return {"PYTHONPATH": os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH", "")])])}

    def close(self) -> None:
        """Remove the files."""
        self._scratch.close()


def _git(folder: Path, *arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.decode(errors="replace").split())
        raise MachineError(f"--llm-against: git {arguments[0]} says: {reason}; name a revision of this repository")
    return done.stdout
