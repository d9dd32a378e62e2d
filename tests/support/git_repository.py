"""A git repository in the current directory, for tests of what is committed."""

from __future__ import annotations

import subprocess

#: A machine of CI has no identity, and without one git commits nothing.
_IDENTITY = ("-c", "user.name=CI", "-c", "user.email=ci@localhost")


def git(*arguments: str) -> str:
    """Run git and return its output. Raises CalledProcessError if it fails."""
    return subprocess.run(["git", *_IDENTITY, *arguments], capture_output=True, text=True, check=True).stdout


def start_repository() -> None:
    """Make the current directory a repository whose branch is ``main``."""
    git("init", "-q", "-b", "main")


def commit(subject: str, *paths: str) -> None:
    """Commit these files, or all changes if there are none."""
    git("add", *(paths or ("-A",)))
    git("commit", "-q", "-m", subject)
