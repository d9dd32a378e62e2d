"""The options of ``pytest --help``, group ``llmload``: registered here, resolved to one :class:`Settings`.

Every option is ``--llmload-NAME``. The short ``--llm-NAME`` and the ini setting ``llm_NAME`` are added once all plugins
and conftests have registered theirs, and give way to whoever owns them.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pytest_llmload.core.metrics import Metric
    from pytest_llmload.core.spec import Workload
    from pytest_llmload.core.units import Tolerance

#: Type of ini settings that take a number too: TOML has numbers, and before pytest 9.2 a setting has one type only.
_NUMBER: Any = str | int | float if pytest.version_tuple >= (9, 2) else "string"


def _report_help() -> str:
    from pytest_llmload.reports.formats import known_suffixes

    return f"Write a report; the suffix chooses the format: {known_suffixes()}. Repeatable."


#: name -> (ini type or None for "no ini twin", default, argparse attributes). A help that is a function is called when
#: help is printed, so that a pytest start does not import what it reads.
OPTIONS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "model": ("linelist", [], {
        "action": "append", "metavar": "[NAME=]SPEC",
        "help": "Model to load: hub id, hub-id@revision, directory, random:PRESET or random:PATH. Repeatable.",
    }),
    "adapter": ("string", "", {
        "metavar": "SPEC", "help": "PEFT adapter: directory, hub id, or 'random' for a LoRA with non-zero weights",
    }),
    "strategy": ("args", [], {
        "action": "append", "metavar": "NAME",
        "help": "Strategy for tests that name none; selects in the ready-made suite. Repeatable.",
    }),
    "loader": ("string", "", {
        "metavar": "MODULE:FUNCTION", "help": "Production's loader, for tests that name no strategy",
    }),
    "endpoint": ("string", "", {
        "metavar": "URL", "help": "A running server, for strategy 'served' and for tests that name no strategy",
    }),
    "import": ("linelist", [], {
        "action": "append", "metavar": "MODULE", "help": "Module imported in each load's process. Repeatable.",
    }),
    "workload": ("string", "1x128+32", {
        "metavar": "BxP+N", "help": "Batch x prompt tokens + new tokens that figures are taken on (default: 1x128+32)",
    }),
    "device": ("string", "auto", {
        "choices": ("auto", "cuda", "cpu"), "help": "Where to load (default: auto, the GPU if there is one)",
    }),
    "baselines": ("string", "baselines", {
        "metavar": "DIR", "help": "Folder of the baselines (default: baselines/ under rootdir)",
    }),
    "baseline-variant": ("string", "", {
        "metavar": "NAME", "help": "Second set of baselines beside the usual one, such as 'nightly'",
    }),
    "update-baselines": (None, False, {
        "action": "store_true", "help": "Write what was measured and differs from the baselines",
    }),
    "record-missing": (None, False, {
        "action": "store_true", "help": "Write baseline entries that do not exist yet, gate the others",
    }),
    "tolerance": ("linelist", [], {
        "action": "append", "metavar": "METRIC=1%|8MiB", "help": "Tolerance of one metric. Repeatable.",
    }),
    "strict": ("bool", False, {
        "action": argparse.BooleanOptionalAction,
        "help": "Fail on everything that was not compared; implies --llm-require-hardware",
    }),
    "require-hardware": ("bool", False, {
        "action": argparse.BooleanOptionalAction, "help": "Missing hardware or packages are errors, not skips",
    }),
    "isolation": (None, "process", {
        "choices": ("process", "inline"),
        "help": "'inline' loads in the pytest process, for debugging: never gates, never records (default: process)",
    }),
    "report": (None, [], {
        "action": "append", "metavar": "FILE", "help": _report_help,
    }),
    "timeout": (_NUMBER, "30min", {
        "metavar": "TIME", "help": "Deadline of one load, download apart (default: 30min)",
    }),
    "wait-gpu": (_NUMBER, "0s", {
        "metavar": "TIME", "help": "How long to wait for a GPU that another process holds (default: 0s)",
    }),
    "cache-dir": ("string", "", {
        "metavar": "DIR", "help": "Where built checkpoints are kept (default: ~/.cache/pytest-llmload)",
    }),
    "record-repeats": (_NUMBER, "2", {
        "metavar": "N", "help": "Loads per recorded baseline (default: 2)",
    }),
    "latency-time": (_NUMBER, "3min", {
        "metavar": "TIME", "help": "Time that one latency check may spend on further processes (default: 3min)",
    }),
    "page-cache": ("string", "warm", {
        "choices": ("warm", "cold", "uncontrolled"),
        "help": "Checkpoint's pages before a measured load: read first, evicted, or as they are (default: warm)",
    }),
    "trust-remote-code": ("bool", False, {
        "action": argparse.BooleanOptionalAction, "help": "Let models bring their own code",
    }),
}  # fmt: skip

_TAKEN = pytest.StashKey[list[str]]()
_TAKEN_INI = pytest.StashKey[list[str]]()


class Settings:
    """What this run was asked for: CLI over ini over default. Sizes in bytes, times in seconds."""

    # A plain class: a dataclass would cost every pytest start more than the whole entry module.
    models: list[str]
    #: What their relative directories are seen from.
    models_base: Path
    root: Path
    #: As every machine calls it.
    adapter: str | None
    strategies: list[str]
    loader: str | None
    #: Without user, password, query or a slash at its end.
    endpoint: str | None
    imports: tuple[str, ...]
    workload: Workload
    device: str
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
    wait_gpu: float
    cache_dir: Path
    record_repeats: int
    latency_time: float
    page_cache: str
    trust_remote_code: bool

    @property
    def recording(self) -> bool:
        return (self.update_baselines or self.record_missing) and not self.inline


def dest(name: str) -> str:
    return "llmload_" + name.replace("-", "_")


def ini_name(name: str) -> str:
    return "llm_" + name.replace("-", "_")


def help_text(name: str) -> str:
    """Return the help of an option."""
    help_ = OPTIONS[name][2]["help"]
    return str(help_() if callable(help_) else help_)


def register(parser: pytest.Parser) -> None:
    """Add ``--llmload-*``."""
    group = parser.getgroup("llmload", "model-loading regression tests")
    for name, (_, _, attributes) in OPTIONS.items():
        group.addoption(f"--llmload-{name}", dest=dest(name), default=None, **{**attributes, "help": argparse.SUPPRESS})


def register_short(config: pytest.Config, parser: pytest.Parser, arguments: list[str]) -> None:
    """Add ``--llm-*`` and the ini settings ``llm_*`` where nobody else has them; called after conftests added theirs.

    Of the options, those that the arguments have: a conftest below may still add its own of the same name.
    """
    known, unknown = parser.parse_known_and_unknown_args(arguments)
    # An unknown one with a space in its value is taken for a file.
    asked = {argument.partition("=")[0] for argument in (*unknown, *known.file_or_dir)}
    group = parser.getgroup("llmload")
    config.stash[_TAKEN] = []
    config.stash[_TAKEN_INI] = []
    all_free = _is_free(parser, [f"--llm-{name}" for name in OPTIONS])
    for name, (ini_type, _, attributes) in OPTIONS.items():
        if not (all_free or _is_free(parser, [f"--llm-{name}"])):
            config.stash[_TAKEN].append(name)
        elif known.help or asked & {f"--llm-{name}", f"--no-llm-{name}"}:
            group.addoption(f"--llm-{name}", dest=dest(name), default=None, **{**attributes, "help": help_text(name)})
        if ini_type is None:
            continue
        if _is_free_ini(config, ini_name(name)):
            parser.addini(ini_name(name), help_text(name), type=ini_type, default=None)
        else:
            config.stash[_TAKEN_INI].append(name)


def answer_for_short(config: pytest.Config) -> None:
    """Let ``config.getoption("--llm-NAME")`` answer for options that nobody wrote, which the parser does not know."""
    for name in OPTIONS:
        if name not in taken(config):
            setattr(config.option, f"--llm-{name}", config.getoption(dest(name)))


def _is_free(parser: pytest.Parser, names: list[str]) -> bool:
    # Whether the parser knows an option is asked through its public interface: what it does not know, it returns.
    try:
        _, unknown = parser.parse_known_and_unknown_args([f"{name}=probe" for name in names])
    except (pytest.UsageError, SystemExit):
        return False
    return len(unknown) == len(names)


def _is_free_ini(config: pytest.Config, name: str) -> bool:
    try:
        config.getini(name)
    except ValueError as error:
        # Unknown, as against a value that its owner could not read.
        return isinstance(error.__cause__, KeyError)
    except (TypeError, pytest.UsageError):
        return False
    return False


def taken(config: pytest.Config) -> list[str]:
    """Names of short options that belong to somebody else."""
    return config.stash.get(_TAKEN, [])


def taken_ini(config: pytest.Config) -> list[str]:
    """Names of options whose ini setting belongs to somebody else."""
    return config.stash.get(_TAKEN_INI, [])


def given(config: pytest.Config) -> bool:
    """Whether the run says which model to load; cheap, for runs that have nothing to do with this plugin."""
    return _given(config, "model")


def any_given(config: pytest.Config) -> bool:
    """Whether the run sets any option of ours; cheap, for runs that have nothing to do with this plugin."""
    return any(_given(config, name) for name in OPTIONS)


def _given(config: pytest.Config, name: str) -> bool:
    return config.getoption(dest(name)) is not None or _ini(config, name) not in (None, "", [])


def flag(config: pytest.Config, name: str) -> str:
    """The spelling of an option that this run understands."""
    return f"--llmload-{name}" if name in taken(config) else f"--llm-{name}"


def given_arguments(config: pytest.Config, *, without: tuple[str, ...]) -> list[str]:
    """Our options as they were typed, values included, but for some."""
    kept: list[str] = []
    arguments = [str(argument) for argument in config.invocation_params.args]
    for position, argument in enumerate(arguments):
        flag, separator, _ = argument.partition("=")
        name = flag.removeprefix("--no-").removeprefix("--").removeprefix("llmload-").removeprefix("llm-")
        if not flag.startswith(("--llm-", "--llmload-", "--no-llm")) or name not in OPTIONS or name in without:
            continue
        kept.append(argument)
        if not separator and OPTIONS[name][2].get("action") in (None, "append"):
            kept += arguments[position + 1 : position + 2]
    return kept


def _ini(config: pytest.Config, name: str) -> Any:
    """What the ini file says; None where it says nothing, or cannot, since the setting is somebody else's."""
    setting = ini_name(name)
    if OPTIONS[name][0] is None or name in taken_ini(config):
        return None
    try:
        return config.getini(setting)
    except (TypeError, ValueError, pytest.UsageError) as error:  # which one depends on pytest's version
        text = str(error)
        raise pytest.UsageError(text if setting in text else f"{setting} in {config.inipath}: {text}") from None


def resolve(config: pytest.Config, table: Mapping[str, Metric]) -> Settings:
    """Return every option as one value; ``table`` holds the metrics that tolerances may name.

    Raises UsageError naming the option and what to write.
    """

    from pytest_llmload.baselines.store import Store
    from pytest_llmload.core.metrics import tolerance_of
    from pytest_llmload.core.paths import path_of
    from pytest_llmload.core.references import is_reference
    from pytest_llmload.core.spec import Workload

    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, (ini_type, default, _) in OPTIONS.items():
        value, source = config.getoption(dest(name)), flag(config, name)
        if value is None and ini_type is not None:
            value, source = _ini(config, name), ini_name(name)
            if value in ("", []):
                value = None
        values[name], sources[name] = (default if value is None else value), source

    def parsed(name: str, parse: Any) -> Any:
        try:
            return parse(values[name])
        except (ValueError, KeyError) as error:
            raise pytest.UsageError(f"{sources[name]}: {error.args[0]}") from None

    def base(name: str) -> Path:
        # On the command line relative to where it was typed, in the ini file relative to that file.
        from_ini = sources[name].startswith("llm_")
        return config.inipath.parent if from_ini and config.inipath else config.invocation_params.dir

    def path(name: str) -> Path:
        found: Path = parsed(name, path_of)
        return base(name) / found

    def tolerances(lines: list[str]) -> dict[str, Tolerance]:
        found = {}
        for line in lines:
            metric, separator, text = line.partition("=")
            if not separator:
                raise ValueError(f"{line!r} is not METRIC=TOLERANCE, as in 'gpu.settled=1%'")
            found[metric] = tolerance_of(metric, text, table)
        return found

    def count(value: object) -> int:
        text = str(value)
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{text!r} is not a number of loads of at least 1")
        return int(text)

    def deadline(value: object) -> float:
        seconds = _seconds_or_number(value)
        if not seconds:
            raise ValueError(f"{str(value)!r} leaves no time to load anything: write more than 0s, as in '30min'")
        return seconds

    def loader(text: str) -> str | None:
        if text and not is_reference(text):
            raise ValueError(f"{text!r} names no function: write MODULE:FUNCTION, as in 'ourapp.serving:load_model'")
        return text or None

    def variant(text: str) -> str | None:
        if text:
            Store(settings.baselines, text)
        return text or None

    def choice(name: str) -> str:
        choices = OPTIONS[name][2]["choices"]

        def check(text: str) -> str:
            if text not in choices:
                raise ValueError(f"{text!r} is none of {', '.join(choices)}")
            return text

        return str(parsed(name, check))

    def suffix(files: list[str]) -> list[Path]:
        from pytest_llmload.reports.formats import suffix_of

        for file in files:
            suffix_of(file)
        return [config.invocation_params.dir / file for file in files]

    def adapter(text: str) -> str | None:
        from pytest_llmload.host.settings.adapters import parse_adapter

        return parse_adapter(text, base("adapter"), config.rootpath) if text else None

    def endpoint(text: str) -> str | None:
        return parse_endpoint(text) if text else None

    settings = Settings()
    settings.models = values["model"]
    settings.models_base = base("model")
    settings.root = config.rootpath
    settings.adapter = parsed("adapter", adapter)
    settings.strategies = values["strategy"]
    settings.loader = parsed("loader", loader)
    settings.endpoint = parsed("endpoint", endpoint)
    settings.imports = tuple(values["import"])
    settings.workload = parsed("workload", Workload.parse)
    settings.device = choice("device")
    default_dir = sources["baselines"].startswith("llm_") and values["baselines"] == "baselines"
    settings.baselines = config.rootpath / "baselines" if default_dir else path("baselines")
    settings.baseline_variant = parsed("baseline-variant", variant)
    settings.update_baselines = values["update-baselines"]
    settings.record_missing = values["record-missing"]
    settings.tolerances = parsed("tolerance", tolerances)
    settings.strict = values["strict"]
    settings.require_hardware = values["require-hardware"] or settings.strict
    settings.inline = values["isolation"] == "inline"
    settings.reports = parsed("report", suffix)
    settings.timeout = parsed("timeout", deadline)
    settings.wait_gpu = parsed("wait-gpu", _seconds_or_number)
    settings.cache_dir = path("cache-dir") if values["cache-dir"] else default_cache()
    settings.record_repeats = parsed("record-repeats", count)
    settings.latency_time = parsed("latency-time", _seconds_or_number)
    settings.page_cache = choice("page-cache")
    settings.trust_remote_code = values["trust-remote-code"]
    return settings


def parse_endpoint(text: str) -> str:
    """An endpoint's address. ValueError says what to write, and repeats nothing that may be a secret."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError("this is no address of a server: write http://HOST:PORT or https://HOST")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "an address with a user, a password or a query may hold a secret, and would be printed: write "
            "http://HOST:PORT, and put the key into the environment variable LLM_ENDPOINT_KEY"
        )
    return text.rstrip("/")


def _seconds_or_number(value: object) -> float:
    """``--llm-wait-gpu 30`` as well as ``30s``."""
    import re

    from pytest_llmload.core.units import parse_seconds

    text = str(value)
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else parse_seconds(text)


def default_cache() -> Path:
    """``~/.cache/pytest-llmload``; a folder for temporary files where the user has no home, as in some containers."""
    import os
    import tempfile
    from pathlib import Path

    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "pytest-llmload"
    try:
        return Path.home() / ".cache" / "pytest-llmload"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"pytest-llmload-{os.getuid()}" / "cache"
