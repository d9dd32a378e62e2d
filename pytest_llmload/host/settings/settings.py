"""The values of a run's options, parsed: :class:`Settings`. Imported only in runs that have to do with loads."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pytest_llmload.baselines.store import Store
from pytest_llmload.core.metrics import METRICS, Metric, tolerance_of
from pytest_llmload.core.paths import path_of
from pytest_llmload.core.quoting import quoted
from pytest_llmload.core.references import is_reference
from pytest_llmload.core.spec import Workload
from pytest_llmload.core.units import Tolerance, parse_seconds
from pytest_llmload.host.settings.adapters import parse_adapter
from pytest_llmload.host.settings.options import OPTIONS, dest, flag, ini_name, ini_value
from pytest_llmload.prediction.devices import predicted_device
from pytest_llmload.reports.formats import suffix_of

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Settings:
    """The values of a run's options in bytes and seconds: the command line's, else the ini file's, else defaults."""

    models: list[str]
    #: The directory from which relative directories of models are seen.
    models_base: Path
    root: Path
    #: The number of layers of models that are loaded; None for all.
    layers: int | None
    #: The adapter by a name that is the same on every machine.
    adapter: str | None
    strategies: list[str]
    loader: str | None
    #: Without user, password, query or a slash at its end.
    endpoint: str | None
    imports: tuple[str, ...]
    workload: Workload
    device: str
    #: The device key that loads are predicted for; None if they are measured.
    predict: str | None
    #: The git revision that a prediction is compared with.
    against: str | None
    baselines: Path
    baseline_variant: str | None
    update_baselines: bool
    record_missing: bool
    tolerances: dict[str, Tolerance]
    strict: bool
    require_hardware: bool
    inline: bool
    reports: list[Path]
    timeout: float
    budget: float
    wait_gpu: float
    cache_dir: Path
    record_repeats: int
    record_allocations: bool
    latency_time: float
    page_cache: str
    trust_remote_code: bool

    @property
    def recording(self) -> bool:
        """Return True if this run may write baselines."""
        return (self.update_baselines or self.record_missing) and not self.inline


def resolve(config: pytest.Config, table: Mapping[str, Metric] = METRICS) -> Settings:
    """Return every option as one value; ``table`` holds the metrics that tolerances may name.

    Raises UsageError that names the option and says what to write.
    """
    given = _Given(config)
    value, parsed = given.value, given.parsed
    baselines = given.baselines()
    strict = value("strict")
    return Settings(
        models=value("model"),
        models_base=given.base("model"),
        root=config.rootpath,
        adapter=given.optional("adapter", lambda text: parse_adapter(text, given.base("adapter"), config.rootpath)),
        layers=given.optional("layers", lambda text: _layers(text, value("endpoint"))),
        strategies=value("strategy"),
        loader=given.optional("loader", _loader),
        endpoint=given.optional("endpoint", parse_endpoint),
        imports=tuple(value("import")),
        workload=parsed("workload", Workload.parse),
        device=given.choice("device"),
        predict=parsed("predict", lambda key: _predict(key, value)),
        against=value("against") or None,
        baselines=baselines,
        baseline_variant=given.optional("baseline-variant", lambda text: _variant(baselines, text)),
        update_baselines=value("update-baselines"),
        record_missing=value("record-missing"),
        tolerances=parsed("tolerance", lambda lines: _tolerances(lines, table)),
        strict=strict,
        require_hardware=value("require-hardware") or strict,
        inline=value("isolation") == "inline",
        reports=[config.invocation_params.dir / file for file in parsed("report", _reports)],
        timeout=parsed("timeout", _deadline),
        budget=parsed("budget", _seconds_or_number),
        wait_gpu=parsed("wait-gpu", _seconds_or_number),
        cache_dir=given.path("cache-dir") if value("cache-dir") else default_cache(),
        record_repeats=parsed("record-repeats", _count),
        record_allocations=value("record-allocations"),
        latency_time=parsed("latency-time", _seconds_or_number),
        page_cache=given.choice("page-cache"),
        trust_remote_code=value("trust-remote-code"),
    )


def _predict(key: str, value: Callable[[str], Any]) -> str | None:
    """Return the device that loads are predicted for. Raises ValueError if it is not known, or if this run records."""
    if not key:
        if value("against"):
            raise ValueError("a revision to compare with needs the device to predict for")
        return None
    unfit = [name for name in ("update-baselines", "record-missing") if value(name)]
    if unfit or value("isolation") == "inline":
        raise ValueError(f"a prediction records nothing and needs processes: remove {(*unfit, 'isolation=inline')[0]}")
    return predicted_device(key).key


class _Given:
    """The raw value of each option, and where it comes from."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._values: dict[str, Any] = {}
        #: Option -> its spelling on the command line, or its name in the ini file.
        self._sources: dict[str, str] = {}
        for name, (ini_type, default, _) in OPTIONS.items():
            value, source = config.getoption(dest(name)), flag(config, name)
            if value is None and ini_type is not None:
                value, source = ini_value(config, name), ini_name(name)
                if value in ("", []):
                    value = None
            self._values[name], self._sources[name] = (default if value is None else value), source

    def value(self, name: str) -> Any:
        return self._values[name]

    def parsed(self, name: str, parse: Callable[[Any], _Value]) -> _Value:
        try:
            return parse(self._values[name])
        except (ValueError, KeyError) as error:
            raise pytest.UsageError(f"{self._sources[name]}: {error.args[0]}") from None

    def optional(self, name: str, parse: Callable[[str], _Value]) -> _Value | None:
        return self.parsed(name, parse) if self._values[name] else None

    def choice(self, name: str) -> str:
        choices = OPTIONS[name][2]["choices"]

        def check(text: str) -> str:
            if text not in choices:
                raise ValueError(f"unknown {quoted(text)}; use one of {', '.join(choices)}")
            return text

        return self.parsed(name, check)

    def _in_ini(self, name: str) -> bool:
        return self._sources[name].startswith("llm_")

    def base(self, name: str) -> Path:
        """Return the directory of a relative path: that of the ini file, or where the command was typed."""
        config = self._config
        return config.inipath.parent if self._in_ini(name) and config.inipath else config.invocation_params.dir

    def path(self, name: str) -> Path:
        return self.base(name) / self.parsed(name, path_of)

    def baselines(self) -> Path:
        is_default = self._in_ini("baselines") and self._values["baselines"] == "baselines"
        return self._config.rootpath / "baselines" if is_default else self.path("baselines")


def _tolerances(lines: list[str], table: Mapping[str, Metric]) -> dict[str, Tolerance]:
    found = {}
    for line in lines:
        metric, separator, text = line.partition("=")
        if not separator:
            raise ValueError(f"{quoted(line)} is not METRIC=TOLERANCE, as in 'gpu.settled=1%'")
        found[metric] = tolerance_of(metric, text, table)
    return found


def _count(value: object) -> int:
    text = str(value)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{quoted(text)} is not a number of loads; write a whole number of at least 1")
    return int(text)


def _layers(value: object, endpoint: str) -> int | None:
    text = str(value)
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a number of layers: write how many of the first ones to load, as in 4")
    if int(text) and endpoint:
        raise ValueError(
            "a running server has loaded its whole model, which cannot be cut; use only one of the two options"
        )
    return int(text) or None


def _deadline(value: object) -> float:
    seconds = _seconds_or_number(value)
    if not seconds:
        raise ValueError(f"{quoted(str(value))} leaves no time to load anything: write more than 0s, as in '30min'")
    return seconds


def _loader(text: str) -> str:
    if not is_reference(text):
        raise ValueError(f"{quoted(text)} names no function: write MODULE:FUNCTION, as in 'ourapp.serving:load_model'")
    return text


def _variant(baselines: Path, text: str) -> str:
    Store(baselines, text)
    return text


def _reports(files: list[str]) -> list[str]:
    for file in files:
        suffix_of(file)
    return files


def parse_endpoint(text: str) -> str:
    """Check an endpoint's address. Raise ValueError that says what to write and repeats no secret."""
    from pytest_llmload.core.endpoint_address import EndpointAddress

    EndpointAddress.parse(text)
    return text.rstrip("/")


def _seconds_or_number(value: object) -> float:
    """Return seconds from ``30`` as well as from ``30s``."""
    text = str(value)
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else parse_seconds(text)


def default_cache() -> Path:
    """Return ``~/.cache/pytest-llmload``, or a folder of this user's own among temporary files without a home.

    Raises UsageError if another user has made, or may write, that folder: what lies there would be loaded. platformdirs
    has the first of these only, and would be one more package in an environment whose versions are part of a baseline.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "pytest-llmload"
    try:
        return Path.home() / ".cache" / "pytest-llmload"
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"pytest-llmload-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise pytest.UsageError(
                f"{folder} is not a folder that only this user can write, so its checkpoints are not trusted: name a "
                "different one with --llm-cache-dir"
            ) from None
        return folder / "cache"
