"""The ``llmload`` command: work with baselines and reports before and after a test run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pytest_llmload.cli.refused import CommandRefused

#: Command -> description, in the order of the help. Each command is the module of its name, imported when it is used.
COMMANDS: dict[str, str] = {
    "plan": "predict a model's memory, the context that fits and the time to load it, without its weights",
    "doctor": "find what would make a load fail before it starts, and name the command that mends it",
    "accept": "write the baselines that a report measured, on any machine",
    "diff": "compare two reports, baseline folders or git revisions",
    "history": "follow a metric through the git history of the baselines",
    "merge": "join the reports of several jobs into one",
    "report": "make a Markdown, HTML or code quality report from a JSON report",
    "show": "print a baseline: how the model was loaded, its figures, and the environment of the recording",
    "rename": "move the baselines of a model to its new name",
    "prune": "delete the baselines that a report calls stale",
}
_EXAMPLES = """\
examples:
  llmload doctor --model org/model                              before the first run
  llmload plan org/model --gpu 24GiB                            what fits, before anything is downloaded
  pytest --llm-model=org/model --llm-report=run.json            measure and gate
  llmload accept run.json && git diff baselines/                accept what a CI job measured
  llmload diff main HEAD                                        what a branch changed in the baselines
  llmload history gpu.settled --svg history.svg                 how a metric came to be what it is
  llmload prune run.json --dry-run                              what a full run found stale

The exit status is 0, or 2 with one sentence on stderr; accept, diff, merge, plan and doctor end with 1 if something was
refused, differs, failed, does not fit, or is wrong.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser(given).parse_args(given)
    try:
        status: int = import_module(f"pytest_llmload.cli.{options.command}").run(options)
        sys.stdout.flush()
    except CommandRefused as error:
        print(f"llmload: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, such as head, has closed the pipe. At exit, Python would flush stdout again and report an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


class _Version(argparse.Action):
    """Action of ``--version``; it reads the distribution's metadata only if requested, since that takes some time."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"llmload {version('pytest-llmload')}")
        parser.exit()


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmload",
        description="Work with the baselines and reports of pytest-llmload.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in given:
            module: Any = import_module(f"pytest_llmload.cli.{name}")
            command.description = module.__doc__
            module.add_arguments(command)
    return parser
