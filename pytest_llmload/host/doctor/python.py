"""Check which Python runs, which pip installs into it, and what shadows or contradicts the installed libraries."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from pytest_llmload.host.doctor.finding import ERROR, FINE, WARNING, Finding
from pytest_llmload.quantisation.builtin import BUILTIN

#: Libraries that decide what a load takes, and whose requirements are looked at.
LIBRARIES = (
    *("torch", "transformers", "accelerate", "peft", "safetensors", "tokenizers"),
    *(canonicalize_name(package) for method in BUILTIN for package in method.packages),
)
_WHERE = re.compile(r"^pip (\S+) from (.+?)[/\\]pip \(python (\S+)\)")


def installs(arguments: str) -> str:
    """Return the command that installs into this environment, with an installer that is there."""
    if find_spec("pip") is None and shutil.which("uv"):
        return f"uv pip install --python {sys.executable} {arguments}"
    pip_ = f"{sys.executable} -m pip install {arguments}"
    return pip_ if find_spec("pip") is not None else f"{sys.executable} -m ensurepip && {pip_}"


def interpreter() -> Iterator[Finding]:
    """Yield which Python this is."""
    kind = "virtual environment" if sys.prefix != sys.base_prefix else "system Python"
    yield Finding("python", FINE, f"Python {sys.version.split()[0]} at {sys.executable} ({kind})")
    if os.geteuid() == 0 and (user := os.environ.get("SUDO_USER")):
        yield Finding(
            "python",
            WARNING,
            f"this runs as root by sudo of {user}: sudo drops HF_HOME, HF_TOKEN and the environment's PATH",
            f"sudo -u {shlex.quote(user)} -H {sys.executable} -m pytest …",
        )


def pip() -> Iterator[Finding]:
    """Yield whether the pip that a user types installs into this environment."""
    own = installs("PACKAGE")
    command = shutil.which("pip")
    if command is None:
        yield Finding("pip", WARNING, "there is no pip on the PATH", own)
        return
    try:
        told = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding("pip", ERROR, f"{command} --version: {error}", own)
        return
    found = _WHERE.match(told.strip())
    if found is None:
        text = f"{command} does not say where it installs to: {told.strip() or 'it prints nothing'}"
        yield Finding("pip", ERROR, text, own)
        return
    where = Path(found[2])
    ours = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    if where.resolve() not in ours and not _is_own_user_site(where, found[3]):
        text = f"{command} installs for Python {found[3]} into {where}, and not into {sysconfig.get_path('purelib')}"
        yield Finding("pip", ERROR, text, own)
    elif not os.access(sysconfig.get_path("purelib"), os.W_OK):
        text = f"{sysconfig.get_path('purelib')} cannot be written, so that pip installs for this user only (--user)"
        yield Finding("pip", WARNING, text, f"{sys.executable} -m venv .venv && . .venv/bin/activate")
    else:
        yield Finding("pip", FINE, f"{command} installs into this environment")
    if os.environ.get("PIP_USER", "").lower() in ("1", "true", "yes", "on"):
        yield Finding("pip", WARNING, "PIP_USER makes pip install outside of this environment", "unset PIP_USER")


def _is_own_user_site(where: Path, python: str) -> bool:
    """Return True for a pip that lives in the user's folder and serves this interpreter."""
    own = ".".join(map(str, sys.version_info[:2]))
    return bool(site.ENABLE_USER_SITE) and where == Path(site.getusersitepackages()) and python == own


def shadowed(folder: Path) -> Iterator[Finding]:
    """Yield files in ``folder`` that are imported instead of a library, and libraries that are installed twice."""
    for name in LIBRARIES:
        for path in (folder / f"{name}.py", folder / name / "__init__.py"):
            if path.is_file():
                text = f"{path} is imported instead of the library {name}"
                renamed = path if path.suffix == ".py" and path.stem == name else path.parent
                yield Finding("shadowed", ERROR, text, f"git mv {renamed} {renamed.parent}/my_{renamed.name}")
    places: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for distribution in distributions():
        name = canonicalize_name(distribution.metadata["Name"] or "")
        if name in LIBRARIES:
            entry = distribution.version, str(distribution.locate_file(""))
            places[name] += [entry] if entry not in places[name] else []
    for name, entries in places.items():
        if len({where for _, where in entries}) > 1:
            text = ", ".join(f"{found} in {where}" for found, where in entries)
            command = f"{sys.executable} -m pip uninstall {name}"
            yield Finding("shadowed", ERROR, f"{name} is installed more than once: {text}; the first counts", command)


def conflicts() -> Iterator[Finding]:
    """Yield the requirements of the libraries that the installed packages do not meet."""
    found = False
    for name in LIBRARIES:
        try:
            wanted = requires(name) or []
        except PackageNotFoundError:
            continue
        for text in wanted:
            try:
                requirement = Requirement(text)
                if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                    continue
                have = version(requirement.name)
            except (InvalidRequirement, PackageNotFoundError):
                continue
            if not requirement.specifier.contains(have, prereleases=True):
                found = True
                message = f"{name} {version(name)} needs {requirement.name}{requirement.specifier}, {have} is installed"
                command = installs(shlex.quote(str(requirement.name) + str(requirement.specifier)))
                yield Finding("versions", ERROR, message, command)
    if not found:
        known = ", ".join(f"{name} {have}" for name in LIBRARIES if (have := installed_version(name)))
        yield Finding("versions", FINE, known or "torch and transformers are not installed")


def installed_version(name: str) -> str:
    """Return an installed package's version; empty if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
