"""Download models of the Hugging Face hub: only the files that a load reads, with one sentence for each failure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.portable import scrub
from pytest_llmload.core.units import counted, plural
from pytest_llmload.worker.checkpoints.build import check_space
from pytest_llmload.worker.checkpoints.cut import Cut
from pytest_llmload.worker.checkpoints.headers import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    WEIGHTS,
    read_index,
)
from pytest_llmload.worker.checkpoints.pickled import INDEX as PICKLED_INDEX
from pytest_llmload.worker.checkpoints.pickled import WEIGHTS as PICKLED

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
#: Packages whose errors are those of a download: the hub's client and the HTTP libraries that its versions use.
_CLIENTS = {"huggingface_hub", "requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "hf_xet"}


def split_id(spec: str) -> tuple[str, str]:
    """Return the id and the revision (empty: the default branch) of ``hub-id@revision``.

    Raises ValueError if it cannot be a hub id.
    """
    name, _, revision = spec.partition("@")
    if not _ID.fullmatch(name) or name.strip(".") == "" or (spec.endswith("@")):
        raise ValueError(
            f"{spec!r} is neither a directory here nor a hub id; write org/model, org/model@revision, a directory, "
            "random:PRESET or random:PATH"
        )
    return name, revision


def download_model(
    spec: str,
    *,
    trust_remote_code: bool = False,
    layers: int | None = None,
    tell: Callable[[int, Path], None] = lambda size, folder: None,
) -> Path:
    """Return the snapshot directory of a model, named by its commit: configuration, tokenizer and the weights it loads,
    which are pickled files only if it has no safetensors; with ``layers``, only the safetensors that hold something of
    a model with so many layers.

    ``tell`` is called before weights are downloaded, with their bytes and the folder that they go to. Raises ValueError
    where ``spec`` is no hub id, MachineError, in one sentence, where the model cannot be had or the disk is too small.
    """
    outline = download_outline(spec, trust_remote_code=trust_remote_code)
    indexed, absent = _wanted(outline, trust_remote_code, layers)
    directory, missing = _fetched(spec, outline, absent, tell)
    if missing and not indexed and layers is None:
        # It has no safetensors.
        indexed = _indexed(directory / PICKLED_INDEX)
        directory, missing = _fetched(spec, directory, _absent(directory, indexed or [PICKLED]), tell)
    if missing and indexed:
        raise MachineError(
            f"{spec} is not wholly in the hub's cache: {len(missing)} of {counted(len(indexed), 'file')} that its "
            f"index names {plural(len(missing), 'is', 'are')} missing ({', '.join(missing[:3])}"
            f"{' …' if len(missing) > 3 else ''}); run once with access to the hub, without HF_HUB_OFFLINE"
        )
    if missing:
        raise MachineError(
            f"{spec} of the hub has no {WEIGHTS}, no {PICKLED} and no complete index of either in {directory}"
        )
    return directory


def _fetched(
    spec: str, directory: Path, missing: list[str], tell: Callable[[int, Path], None]
) -> tuple[Path, list[str]]:
    """Download files of a model; return its snapshot directory and those that are missing still."""
    if not missing:
        return directory, []
    with _one_sentence(spec):
        size = _sizes(split_id(spec)[0], directory.name, missing)
    blobs = directory.parent.parent / "blobs"
    check_space(f"the download of {spec}", size, blobs, "name a different folder with HF_HOME")
    tell(size, blobs)
    with _one_sentence(spec):
        directory = _snapshot(split_id(spec)[0], directory.name, missing)
    return directory, _absent(directory, missing)


def download_size(spec: str, directory: Path, *, trust_remote_code: bool = False, layers: int | None = None) -> int:
    """Return the bytes of weights that :func:`download_model` would download; ``directory`` is the model's outline.

    Raises MachineError, in one sentence, where the hub does not tell.
    """
    _, missing = _wanted(directory, trust_remote_code, layers)
    if not missing:
        return 0
    with _one_sentence(spec):
        return _sizes(split_id(spec)[0], directory.name, missing)


def _wanted(directory: Path, trust_remote_code: bool, layers: int | None) -> tuple[list[str], list[str]]:
    """Return the files of weights that an index names, and those of a load that are not here."""
    indexed = _indexed(directory / INDEX)
    if layers is not None:
        indexed = Cut(directory, layers, trust_remote_code=trust_remote_code).indexed_files()
    # Only the files that the index names: a repository may hold others (original, consolidated).
    return indexed, _absent(directory, indexed or [WEIGHTS])


def _sizes(name: str, commit: str, files: list[str]) -> int:
    """Return the bytes of some files of a model, as the hub has them; 0 offline, where nothing is downloaded."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return 0
    siblings = huggingface_hub.HfApi().model_info(name, revision=commit, files_metadata=True).siblings or []
    return sum(sibling.size or 0 for sibling in siblings if sibling.rfilename in files)


def _absent(directory: Path, names: list[str]) -> list[str]:
    return [name for name in names if not (directory / name).is_file()]


def download_outline(spec: str, *, trust_remote_code: bool = False) -> Path:
    """Return the snapshot directory of a model without its weights: configuration and index, for planning.

    Raises the same errors as :func:`download_model`.
    """
    name, revision = split_id(spec)
    with _one_sentence(spec):
        return _snapshot(name, revision, (*_SMALL_FILES, *(("*.py",) if trust_remote_code else ())))


def download_adapter(spec: str) -> Path:
    """Return the snapshot directory of a PEFT adapter. Raises the same errors as :func:`download_model`."""
    name, revision = split_id(spec)
    with _one_sentence(spec):
        directory = _snapshot(name, revision, _ADAPTER_FILES)
    missing = [file for file in _ADAPTER_FILES if not (directory / file).is_file()]
    if missing:
        raise MachineError(
            f"{spec} of the hub is not a PEFT adapter in safetensors: it has no {' and no '.join(missing)}"
        )
    return directory


def _snapshot(name: str, revision: str, patterns: tuple[str, ...] | list[str]) -> Path:
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        name,
        revision=revision or None,
        allow_patterns=list(patterns),
        ignore_patterns=["*/*"],  # transformers reads the top directory only
    )
    return Path(found)


def _indexed(index: Path) -> list[str]:
    return sorted(set(read_index(index).values())) if index.is_file() else []


@contextmanager
def _one_sentence(spec: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        names = [cls.__name__ for cls in type(error).__mro__]
        ours = {cls.__module__.partition(".")[0] for cls in type(error).__mro__} & _CLIENTS
        if not ours and not isinstance(error, OSError):
            raise
        raise MachineError(f"cannot download {spec}: {_reason(error, names)}") from None


def _reason(error: Exception, names: list[str]) -> str:
    if "GatedRepoError" in names:
        return "the model is gated; accept its terms on the hub and set HF_TOKEN for an account that has access"
    if "RepositoryNotFoundError" in names:
        return "the hub has no such model, or HF_TOKEN's account may not see it (and there is no such directory here)"
    if "RevisionNotFoundError" in names or "RevisionResolutionError" in names:
        return "the model has no such revision"
    if "OfflineModeIsEnabled" in names or "LocalEntryNotFoundError" in names or "CacheNotFound" in names:
        return (
            "it is not (or not wholly) in the hub's cache, and the hub is unreachable or HF_HUB_OFFLINE is set; "
            "there is no such directory here either"
        )
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    first = next(iter(str(error).strip().splitlines()), "")
    return scrub(f"{type(error).__name__}: {first}" if first else type(error).__name__)
