"""The end of a run: errors about the run as a whole, the reports and the summary."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmload.core.errors import ReportError
from pytest_llmload.host.run.stale import stale_baselines
from pytest_llmload.host.run.stash import state_of
from pytest_llmload.reports import formats, terminal
from pytest_llmload.reports.document import document
from pytest_llmload.reports.layout import joined

if TYPE_CHECKING:
    from pytest_llmload.host.run.log import RunLog
    from pytest_llmload.host.run.state import State

#: The suffix of the reports that programs read: they are written again after every test.
_FOR_PROGRAMS = ".json"
#: The most names in a note.
_NAMES = 8
#: A report for people is written again once so many times the seconds have passed that writing it took.
_REST = 20


def finish(session: pytest.Session, state: State) -> None:
    """Judge the run as a whole unless it was cut short, then write the reports.

    In an xdist worker, the controller does both.
    """
    option = session.config.option
    lists_only = option.collectonly or option.showfixtures or option.show_fixtures_per_test
    if state.is_worker or lists_only:
        return
    if session.exitstatus in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR):
        return
    cut_short = session.shouldstop or session.shouldfail or session.exitstatus == pytest.ExitCode.INTERRUPTED
    # --setup-only and --setup-plan run no test.
    if not cut_short and not option.setuponly:
        _judge(session, state)
    for path in state.settings.reports:
        try:
            formats.write(path, report_document(state, state.log))
        except (OSError, TypeError, ValueError, ReportError) as error:
            # Another plugin's hook may have put a value into a result that the format cannot hold.
            reason = getattr(error, "strerror", None) or error
            _session_error(session, state, "report", f"cannot write {path}: {reason}")


def write_progress(config: pytest.Config) -> None:
    """Write the reports of a run that goes on, so that one that is killed leaves what was measured until then.

    In an xdist worker nothing is written: the controller writes what all workers have measured.
    """
    state = state_of(config)
    if not state.is_worker and state.settings.reports:
        write_so_far(state, state.log)


def write_so_far(state: State, log: RunLog) -> None:
    """Write the reports of a run that goes on, from what its log holds by now.

    An HTML report of many loads takes a second: those for people are written less often, and take 5 % of the time.
    """
    now = time.monotonic()
    due = [path for path in state.settings.reports if state.report_due.get(path, now) <= now]
    if not due:
        return
    so_far = report_document(state, log)
    so_far["notes"].append("the run had not ended when this was written")
    for path in due:
        begin = time.monotonic()
        # The end of the run reports why it cannot be written, as an error.
        with contextlib.suppress(OSError, TypeError, ValueError, ReportError):
            formats.write(path, so_far)
        if formats.suffix_of(str(path)) != _FOR_PROGRAMS:
            end = time.monotonic()
            state.report_due[path] = end + _REST * (end - begin)


def report_document(state: State, log: RunLog) -> dict[str, Any]:
    """Return the run's report document, of the loads that a log holds."""
    stale = [state.display(path) for path in state.stale]
    return document(list(log.runs.values()), stale=stale, notes=_notes(state))


def _judge(session: pytest.Session, state: State) -> None:
    asked = [run for run in state.log.runs.values() if run.nodeids]
    if state.log.has_load_tests and not any(run.result is not None for run in asked):
        reasons = dict.fromkeys(message for run in asked for message in run.messages)
        text = "tests requested model loads, but none was measured"
        _session_error(session, state, "nothing-measured", "\n".join([text, *(f"  {reason}" for reason in reasons)]))
    state.stale = stale_baselines(state)
    if state.stale and state.settings.strict:
        names = "\n".join(f"  {state.display(path)}" for path in state.stale)
        text = f"no test uses these baselines; delete them with 'llmload prune' and a report of this run:\n{names}"
        _session_error(session, state, "baselines", text)


def _session_error(session: pytest.Session, state: State, name: str, text: str) -> None:
    """Report an error about the run as a whole as if it were a test's: in the summary, JUnit and the exit status."""
    nodeid = f"llmload::{name}"
    report = pytest.TestReport(
        nodeid=nodeid,
        location=("llmload", None, nodeid),
        keywords={},
        outcome="failed",
        longrepr=text,
        when="teardown",
    )
    session.config.hook.pytest_runtest_logreport(report=report)
    state.session_errors.add(nodeid)
    session.testsfailed += 1
    if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def summarise(reporter: Any, state: State) -> None:
    """Print the table of loads and the lists under it."""
    if state.is_worker or not (state.log.runs or state.stale):
        return
    lines = terminal.summary(
        list(state.log.runs.values()),
        width=reporter._tw.fullwidth,
        stale=[state.display(path) for path in state.stale],
        notes=_notes(state),
    )
    reporter.section("llmload", sep="=")
    for line in lines:
        reporter.write_line(line)


def _notes(state: State) -> list[str]:
    alike: dict[str, list[str]] = {}
    for name, reason in state.log.left_out.items():
        alike.setdefault(reason, []).append(name)
    notes = [f"not loaded by the suite: {joined(names, _NAMES)}, {reason}" for reason, names in alike.items()]
    cold_reason = state.broker.cold_reason or state.log.cold_reason
    if cold_reason is not None:
        notes.append(f"loads started without the warm server: {cold_reason}")
    if state.settings.inline:
        notes.append("inline: loads lived in the pytest process, nothing was gated or recorded")
    return notes
