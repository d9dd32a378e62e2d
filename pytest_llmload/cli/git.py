"""Read baselines from git: the files of a revision, and each file's history."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_llmload.cli.refused import CommandRefused

_SEPARATOR = "\x1e"


@dataclass(frozen=True)
class Commit:
    """A commit that changed files: path -> blob, or None for a deleted file."""

    id: str
    date: str
    subject: str
    changes: dict[str, str | None]


def commit_of(revision: str) -> str:
    """Return the commit that a revision names. Raises CommandRefused."""
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", may_fail=True)
    if not found:
        raise CommandRefused(f"{revision!r} is not a file, a folder or a git revision here")
    return found.strip()


def files_at(commit: str, folder: Path) -> dict[str, str]:
    """Return the path below ``folder`` -> the text of every file that a commit has there."""
    where = _in_repository(folder)
    listing = _git("ls-tree", "-r", "-z", "--full-tree", commit, "--", where)
    blobs = {}
    for entry in filter(None, listing.split("\0")):
        mode, path = entry.split("\t", 1)
        blobs[path] = mode.split()[2]
    texts = contents(blobs.values())
    return {path.removeprefix(f"{where}/"): texts[blob] for path, blob in blobs.items()}


def history(folder: Path) -> list[Commit]:
    """Return the commits that changed files below ``folder``, oldest first; merges only with their own changes."""
    where = _in_repository(folder)
    text = _git(
        "log", "--reverse", "--no-renames", "--raw", "--no-abbrev", "-z",
        f"--format={_SEPARATOR}%H%x00%cs%x00%s%x00", "--", f":(top){where}",
    )  # fmt: skip
    return [_commit(part, where) for part in text.split(_SEPARATOR)[1:]]


def _commit(text: str, where: str) -> Commit:
    identity, date, subject, *rest = text.split("\0")
    entries = [entry.lstrip("\n") for entry in rest if entry.strip()]
    changes: dict[str, str | None] = {}
    for state, path in zip(entries[::2], entries[1::2], strict=True):
        _, _, _, blob, status = state.split()
        changes[path.removeprefix(f"{where}/")] = None if status == "D" else blob
    return Commit(identity, date, subject, changes)


def contents(blobs: Iterable[str]) -> dict[str, str]:
    """Return each blob -> its text."""
    wanted = list(dict.fromkeys(blobs))
    return dict(_contents(wanted)) if wanted else {}


def _contents(blobs: Sequence[str]) -> Iterator[tuple[str, str]]:
    command = ["git", "cat-file", "--batch"]
    done = subprocess.run(command, input="\n".join(blobs).encode() + b"\n", capture_output=True, check=True)
    data, at = done.stdout, 0
    for blob in blobs:
        line = data.index(b"\n", at)
        size = int(data[at:line].split()[2])
        yield blob, data[line + 1 : line + 1 + size].decode("utf-8", errors="replace")
        at = line + 1 + size + 1


def _in_repository(folder: Path) -> str:
    """Return a folder relative to the top of its git repository. Raises CommandRefused if it is not in one."""
    top = _git("rev-parse", "--show-toplevel", may_fail=True)
    if not top:
        raise CommandRefused("this is not a git repository")
    root, path = Path(top.strip()).resolve(), folder.resolve()
    if not path.is_relative_to(root):
        raise CommandRefused(f"{folder} is outside the git repository {root}")
    return path.relative_to(root).as_posix()


def _git(*arguments: str, may_fail: bool = False) -> str:
    """Return what a git command prints; empty if it fails and may fail. Raises CommandRefused otherwise."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        raise CommandRefused("git is not installed") from None
    if done.returncode == 0:
        return done.stdout.decode("utf-8", errors="replace")
    if may_fail:
        return ""
    raise CommandRefused(f"git {arguments[0]}: {done.stderr.decode(errors='replace').strip() or done.returncode}")
