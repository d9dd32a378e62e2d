"""The model's configuration is the checkpoint's: what a load changed in it is named without a baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import counted, plural
from pytest_llmload.worker.checkpoints.architecture import meta_model
from pytest_llmload.worker.checks.tied import TIES, trained_apart
from pytest_llmload.worker.model.loaded import Loaded

CHECK = "config"
#: Fields that a load sets by its spec, fields that say where a config came from, and the type: several types share a
#: class, which calls itself by its own type.
_BY_LOAD = frozenset(
    {"dtype", "torch_dtype", "quantization_config", "architectures", "transformers_version", "auto_map", "model_type"}
)
_PLAIN = (bool, int, float, str)


def check(loaded: Loaded) -> Iterator[Problem]:
    """Compare each plain field with that of the same class made from config.json; options of the test may differ.

    A loader or a strategy of the user's own may change the config on purpose: what it changed is noted.
    """
    job = loaded.job
    try:
        expected = expected_config(job.checkpoint.path, job.trust_remote_code, job.spec.auto_class)
    except ValueError as error:
        loaded.notes.append(f"the model's config was not compared: {error}")
        return
    if not hasattr(loaded.config, "to_dict"):
        return
    asked = {name for name, _ in loaded.job.spec.options}
    if loaded.adapter is not None and loaded.adapter.config.get("layer_replication"):
        # Such an adapter repeats decoder layers of the base.
        asked |= {"num_hidden_layers", "layer_types"}
    if trained_apart(loaded):
        asked.add(TIES)
    before, now = dict(_fields(expected.to_dict())), dict(_fields(loaded.config.to_dict()))
    changed = [
        f"{name} is {now[name]!r}, config.json says {before[name]!r}"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name] and not asked.intersection(name.split("."))
    ]
    users = not loaded.job.strategies.keys().isdisjoint(loaded.job.spec.facets())
    if changed and (loaded.own_code or users):
        loaded.notes.append(f"the load's own code changed the model's config: {'; '.join(changed[:4])}")
    elif changed:
        what = f"{counted(len(changed), 'field')} of the model's config {plural(len(changed), 'differs', 'differ')}"
        yield Problem(CHECK, f"{what} from the checkpoint's", tuple(changed))


@cache
def expected_config(path: str, trust_remote_code: bool, auto_class: str | None) -> Any:
    """Return the config of a model without values, made once in a process: classes change it when constructed.

    Raises ValueError if the installed transformers does not know the architecture.
    """
    return meta_model(Path(path), trust_remote_code=trust_remote_code, auto_class=auto_class).config


def _fields(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if name in _BY_LOAD or name.startswith("_"):
            continue
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            yield from _fields(value, f"{prefix}{name}.")
        elif type(value) in _PLAIN:
            yield f"{prefix}{name}", value
