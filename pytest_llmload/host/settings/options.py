"""The options of ``pytest --help``, group ``llmload``: the table, their registration and how they were given.

:mod:`pytest_llmload.host.settings.settings` parses their values. Every option is ``--llmload-NAME``. The short
``--llm-NAME`` and the ini setting ``llm_NAME`` are added once all plugins and conftests have registered theirs, unless
one of them owns the name.
"""

from __future__ import annotations

import argparse
from typing import Any

import pytest

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
        "help": "Hub id, hub-id@revision, directory, GGUF file, random:PRESET or random:PATH to load. Repeatable.",
    }),
    "adapter": ("string", "", {
        "metavar": "SPEC", "help": "PEFT adapter: directory, hub id, or 'random' for a LoRA with non-zero weights",
    }),
    "layers": (_NUMBER, "", {
        "metavar": "N",
        "help": "Load only the first N layers of each kind of every model; their baselines are those of NAME@N-layers "
                "(default: 0, all layers)",
    }),
    "strategy": ("args", [], {
        "action": "append", "metavar": "NAME",
        "help": "Strategy for tests that name none; selects in the ready-made suite. Repeatable.",
    }),
    "loader": ("string", "", {
        "metavar": "MODULE:FUNCTION", "help": "Production's loader, for tests that name no strategy",
    }),
    "endpoint": ("string", "", {
        "metavar": "[MODEL_ID=]URL",
        "help": "A running server, for strategy 'served' and for tests that name no strategy; the ready-made suite "
                "then loads nothing else. MODEL_ID is the id that it serves the model under, where that is not the "
                "model's name",
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
    "predict": (None, "", {
        "metavar": "DEVICE", "help": "Predict GPU memory for a device of the baselines, without one; never records",
    }),
    "against": (None, "", {
        "metavar": "REV", "help": "Where a prediction regressed, trace the code of this git revision too, and compare",
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
    "budget": (_NUMBER, "0s", {
        "metavar": "TIME",
        "help": "Time for all loads; tests of a load that has not started by then are skipped (default: 0s, no limit)",
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
    "record-allocations": ("bool", False, {
        "action": argparse.BooleanOptionalAction,
        "help": "Record the lines that allocate memory with a memory baseline, by one more load; a failure shows them "
                "beside today's",
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


def dest(name: str) -> str:
    """Return the attribute of ``config.option`` that holds an option."""
    return "llmload_" + name.replace("-", "_")


def ini_name(name: str) -> str:
    """Return an option's name in the ini file."""
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
    """Add ``--llm-*`` and the ini settings ``llm_*`` that no other plugin has; called after conftests added theirs.

    Of the options, only those that the arguments have: a conftest below may still add its own of the same name.
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
    """Let ``config.getoption("--llm-NAME")`` answer for options that were not given: the parser does not know them."""
    for name in OPTIONS:
        if name not in taken(config):
            setattr(config.option, f"--llm-{name}", config.getoption(dest(name)))


def _is_free(parser: pytest.Parser, names: list[str]) -> bool:
    # The parser's public interface does not list its options, but it returns the arguments that it does not know.
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
    """Return the names of the short options that belong to another plugin."""
    return config.stash.get(_TAKEN, [])


def taken_ini(config: pytest.Config) -> list[str]:
    """Return the names of the options whose ini setting belongs to another plugin."""
    return config.stash.get(_TAKEN_INI, [])


def given(config: pytest.Config) -> bool:
    """Return whether the run names a model to load; cheap, for runs that have nothing to do with this plugin."""
    return _given(config, "model")


def any_given(config: pytest.Config) -> bool:
    """Return whether the run sets any option of ours; cheap, for runs that have nothing to do with this plugin."""
    return any(_given(config, name) for name in OPTIONS)


def _given(config: pytest.Config, name: str) -> bool:
    return config.getoption(dest(name)) is not None or ini_value(config, name) not in (None, "", [])


def flag(config: pytest.Config, name: str) -> str:
    """Return the spelling of an option that this run understands."""
    return f"--llmload-{name}" if name in taken(config) else f"--llm-{name}"


def given_arguments(config: pytest.Config, *, without: tuple[str, ...]) -> list[str]:
    """Return our options as they were typed, values included, except some."""
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


def ini_value(config: pytest.Config, name: str) -> Any:
    """Return the value of the ini file; None if it has none, or if the setting belongs to another plugin.

    Raises UsageError for a value of the wrong type.
    """
    setting = ini_name(name)
    if OPTIONS[name][0] is None or name in taken_ini(config):
        return None
    try:
        return config.getini(setting)
    except (TypeError, ValueError, pytest.UsageError) as error:  # which one depends on pytest's version
        text = str(error)
        raise pytest.UsageError(text if setting in text else f"{setting} in {config.inipath}: {text}") from None
