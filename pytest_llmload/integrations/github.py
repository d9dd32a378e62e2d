"""GitHub Actions: failures and errors as annotations, the loads' logs as groups, the report as the job's summary.

Registered if ``GITHUB_ACTIONS=true``, without any configuration.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from pytest_llmload.host.run.stash import existing_state
from pytest_llmload.reports import markdown
from pytest_llmload.reports.github import Annotation, errors, escape, group, resume, stop

_FAILED = pytest.StashKey[dict[str, Annotation]]()


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin that collects the failures.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_configure
    """
    config.stash[_FAILED] = {}
    silence = _Silence()
    config.pluginmanager.register(_Collector(config, silence), "llmload-github")
    config.pluginmanager.register(_Reporting(config, silence), "llmload-github-silence")
    config.pluginmanager.register(_Others(silence), "llmload-github-commands")


def _has_loads(config: pytest.Config) -> bool:
    state = existing_state(config)
    return state is not None and bool(state.log.runs or state.session_errors)


def _message(report: pytest.TestReport) -> str:
    """Return what an error says: the whole text of this plugin's, and the message of any other."""
    shown: Any = report.longrepr
    if (crash := getattr(shown, "reprcrash", None)) is None:
        return report.longreprtext
    last = shown.reprtraceback.reprentries[-1]
    return "\n".join(last.lines) if last.style == "value" else str(crash.message)


class _Silence:
    """A time in which the runner obeys no line of the log: what a model, a log or an exception says is only text."""

    def __init__(self) -> None:
        self._token = ""

    def begin(self, reporter: Any) -> None:
        """Have the runner obey nothing until :meth:`end`."""
        self._token = secrets.token_hex(16)
        reporter.write_line(stop(self._token))

    def end(self, reporter: Any) -> None:
        """Have the runner obey commands again, if it does not."""
        if self._token:
            reporter.write_line(resume(self._token))
            self._token = ""


class _Reporting:
    """Silences pytest's own report and this plugin's table, which print texts from outside."""

    def __init__(self, config: pytest.Config, silence: _Silence) -> None:
        self._config = config
        self._silence = silence

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> Generator[None, None, None]:
        """Silence failures, captured output and warnings before the summary, and the list of failures after it.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_terminal_summary
        """
        if _has_loads(self._config):
            self._silence.begin(terminalreporter)
        try:
            return (yield)
        finally:
            self._silence.end(terminalreporter)


class _Others:
    """Lets other plugins give commands, which print theirs in the summary."""

    def __init__(self, silence: _Silence) -> None:
        self._silence = silence

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """End the silence once this plugin's table is printed, which is done first of all.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_terminal_summary
        """
        self._silence.end(terminalreporter)


class _Collector:
    """A plugin that notes every failure and error of tests that use a load, also of those in xdist workers."""

    def __init__(self, config: pytest.Config, silence: _Silence) -> None:
        self._config = config
        self._silence = silence

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection(self) -> Generator[None, object, object]:
        """Print a wrong option or marker as an error: nothing runs, and there is no summary that could have it.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_collection
        """
        return (yield from self._told())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        """Do the same for mistakes that workers of pytest-xdist found.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_runtestloop
        """
        return (yield from self._told())

    def _told(self) -> Generator[None, object, object]:
        try:
            return (yield)
        except pytest.UsageError as error:
            reporter = self._config.pluginmanager.getplugin("terminalreporter")
            for line in errors([Annotation("usage error", str(error))]) if reporter is not None else ():
                reporter.write_line(line)
            raise

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a failure or an error of a test that uses a load.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_runtest_logreport
        """
        is_ours = "llmload" in report.keywords or report.nodeid.startswith("llmload::")
        if not report.failed or not is_ours:
            return
        failed = self._config.stash[_FAILED]
        word = "FAILED" if report.when == "call" else "ERROR"
        failed.setdefault(report.nodeid, self._annotation(report, word))

    def _annotation(self, report: pytest.TestReport, word: str) -> Annotation:
        file, line, _ = report.location
        return Annotation(f"{word} {report.nodeid}", _message(report), self._in_repository(file), (line or 0) + 1)

    def _in_repository(self, file: str) -> str:
        """Return a file's path relative to the checkout; empty for a file outside of it, such as the suite's."""
        checkout = Path(os.environ.get("GITHUB_WORKSPACE") or self._config.rootpath)
        path = self._config.rootpath / file
        return str(path.relative_to(checkout)) if path.is_file() and path.is_relative_to(checkout) else ""

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the annotations and the loads' logs, and write the job's summary.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_terminal_summary
        """
        state = existing_state(self._config)
        if state is None or not _has_loads(self._config):
            return
        from pytest_llmload.host.hooks.finishing import report_document

        for run in state.log.runs.values():
            if run.result is not None and run.result.error is not None and run.result.error.log:
                lines = run.result.error.log.splitlines()
                for line in group(f"log of {run.spec.id}", lines, secrets.token_hex(16)):
                    terminalreporter.write_line(line)
        for line in errors(list(self._config.stash[_FAILED].values())):
            terminalreporter.write_line(line)
        if target := os.environ.get("GITHUB_STEP_SUMMARY"):
            try:
                with Path(target).open("a", encoding="utf-8") as file:
                    file.write(markdown.text(report_document(state, state.log)) + "\n")
            except OSError as error:
                reason = error.strerror or error
                text = escape(f"cannot write the job's summary: {reason}")
                terminalreporter.write_line(f"::warning title=llmload::{text}")
        # pytest's list of failures follows.
        self._silence.begin(terminalreporter)
