"""``--llm-model [NAME=]SPEC``: the models of a run and their names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from pytest_llmload.core.cut_names import cut_name
from pytest_llmload.core.paths import path_of
from pytest_llmload.core.presets import config_of
from pytest_llmload.core.quoting import quoted

#: As long as the longest hub id with some to spare; a file's name may have 255.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class Model(NamedTuple):
    """A model of the run."""

    #: In ids and baselines: NAME, ``org--name``, the preset or the directory's name.
    name: str
    spec: str


def parse_model(text: str, base: Path, layers: int | None = None) -> Model:
    """Return a model from ``[NAME=]SPEC``.

    Relative directories start at ``base``. With ``layers``, its name says that it has only so many. Raises ValueError
    that says what is wrong and what to write.
    """
    name, separator, spec = text.partition("=")
    if not separator or "/" in name:
        # A path may have a '=' too.
        name, spec = "", text
    if not spec:
        raise ValueError(f"{quoted(text)} names no model: write a hub id, a directory, a GGUF file or random:PRESET")
    scheme, _, rest = spec.partition(":")
    if scheme == "random":
        if not rest:
            raise ValueError(
                f"{quoted(spec)} names no preset: write random:tiny-llama, or random:PATH to a config.json"
            )
        local = _local(rest, base)
        if local is not None:
            spec = f"random:{local}"
            own = local.name if local.is_dir() else local.parent.name if local.name == "config.json" else local.stem
        else:
            own = rest
        config_of(spec)
    else:
        local = _local(spec, base)
        if local is not None:
            spec, own = str(local), local.stem if local.suffix == ".gguf" else local.name
        else:
            own = spec.partition("@")[0].replace("/", "--")
            if re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", spec) is None or ".." in spec:
                raise ValueError(
                    f"{quoted(spec)} is neither a directory on this machine nor a hub id such as 'org/model' or "
                    "'org/model@revision'"
                )
    chosen = name or own
    if _NAME.fullmatch(chosen) is None or ".." in chosen:
        raise ValueError(
            f"{quoted(chosen)} cannot name a model: it becomes a folder of the baselines and part of test ids; "
            "write NAME=SPEC with a NAME of at most 200 letters, digits, '.', '_' and '-'"
        )
    return Model(chosen if layers is None else cut_name(chosen, layers), spec)


def _local(text: str, base: Path) -> Path | None:
    path = base / path_of(text)
    looks_local = text.startswith((".", "/", "~"))
    if path.exists():
        return path.resolve()
    if looks_local:
        raise ValueError(
            f"{quoted(text)} is not a directory or GGUF file on this machine (looked at {quoted(str(path))})"
        )
    return None
