"""Run a test that uses a load: skips before it, the load's error in its call phase, limits after its body."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
from _pytest._code.code import ReprEntry, ReprFileLocation, TerminalRepr

from pytest_llmload.core import verdicts
from pytest_llmload.core.code_paths import INSTALLED
from pytest_llmload.core.errors import (
    BaselineError,
    BaselineIncomparable,
    BaselineMissing,
    BudgetExceeded,
    CeilingExceeded,
    CheckRaised,
    LatencyRegressed,
    LLMLoadError,
    LoadError,
    LoadTimeout,
    MachineError,
    MemoryRegressed,
    RemoteError,
    RequirementMissing,
)
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.host.checks import limits, requirements
from pytest_llmload.host.hooks.factory import ASKED_FOR
from pytest_llmload.host.loads.llm import LLM
from pytest_llmload.host.loads.load import Load
from pytest_llmload.host.run.stash import state_of
from pytest_llmload.host.run.state import SKIP_REASON, State
from pytest_llmload.reports import junit

#: The exception of a fixture whose load is not a model: a test failure, so it waits for the call phase.
_LOAD_ERROR = pytest.StashKey[LoadError]()
#: The exceptions of comparisons with a baseline.
_COMPARISONS = (MemoryRegressed, LatencyRegressed, BaselineMissing, BaselineIncomparable)


def around_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Skip what cannot run here; keep a failed load's error, raised through a user's fixture, for the call phase."""
    __tracebackhide__ = True
    state_of(item.config).loads.begin_test()
    _forget_failed_load(item)
    try:
        _skip_if_missing(item)
        _check_recordable(item)
        return (yield)
    except LoadError as error:
        item.stash[_LOAD_ERROR] = error
    except RequirementMissing as error:
        state_of(item.config).skip(item, state_of(item.config).loaded_by(item), str(error))


def _forget_failed_load(item: pytest.Item) -> None:
    """Have a failed load begin again if pytest-rerunfailures runs the test again."""
    state = state_of(item.config)
    load = state.load_of(item)
    if load is None or getattr(item, "execution_count", 1) == 1 or not load.forget_failure():
        return
    run = state.run(load.spec)
    if set(run.nodeids) <= {item.nodeid}:
        # What the first attempt added says nothing about this one.
        del state.log.runs[load.spec]


def _skip_if_missing(item: pytest.Item) -> None:
    """Skip a test whose load cannot run here; raise MachineError if this run must not skip."""
    __tracebackhide__ = True
    state = state_of(item.config)
    spec = state.spec_of(item)
    names = getattr(item, "fixturenames", ())
    if spec is None and ("llm_spec" in names or ("llm_load" in names and not state.models)):
        return  # no model: its own skip mark says so, or llm_load, which may be given one
    reason = requirements.missing(state, item, spec)
    if reason is not None:
        state.skip(item, state.loaded_by(item), reason)


def _check_recordable(item: pytest.Item) -> None:
    """Raise BaselineError, before anything is loaded, if the test could not write the baseline that it records."""
    __tracebackhide__ = True
    state = state_of(item.config)
    settings, spec = state.settings, state.spec_of(item)
    names = item.fixturenames  # type: ignore[attr-defined]
    if spec is None or settings.inline or not {"memory_baseline", "latency_baseline"} & set(names):
        return
    path = state.baseline_path(spec)
    if settings.update_baselines or (settings.record_missing and not path.exists()):
        state.store.check_writable(path)


def acquire(config: pytest.Config, spec: LoadSpec) -> LLM:
    """Return the measured ``llm`` of a spec. Raises MachineError; for a failed load, the handle has the error.

    The handle also has the error of a load during which a different plugin ended the test: pytest keeps what a fixture
    raises for the next tests.
    """
    state = state_of(config)
    load = state.loads.of(spec)
    try:
        state.run(spec).result = load.result
    except LoadTimeout as interrupted:
        state.run(spec).result = interrupted.result
    return LLM(load)


def around_call(item: pytest.Item) -> Generator[None, None, None]:
    """Raise the load's error before the body, and what exceeds a limit after it."""
    __tracebackhide__ = True
    state = state_of(item.config)
    load = state.load_of(item)
    if _LOAD_ERROR in item.stash:
        raise item.stash[_LOAD_ERROR]
    if load is not None and (error := load.error) is not None:
        raise error
    if load is not None:
        # The fixture of a test that is run again may have been set up by its first attempt.
        state.run(load.spec).result = load.result
    value = yield
    loads = [load] if load is not None else []
    for each in dict.fromkeys(loads + item.stash.get(ASKED_FOR, [])):
        if each.error is None:
            _check_limits(state, item, each)
    return value


def _check_limits(state: State, item: pytest.Item, load: Load) -> None:
    __tracebackhide__ = True
    if state.settings.inline:
        return
    spec = load.spec
    over_ceiling, no_memory = limits.over_ceilings(item, load.result, state.subject(spec))
    over_budget, no_time = limits.over_budgets(item, load, state)
    state.run(spec).over_limits += over_ceiling + over_budget
    if over_ceiling:
        raise CeilingExceeded("\n".join(over_ceiling + over_budget))
    if over_budget:
        raise BudgetExceeded("\n".join(over_budget))
    if unmeasured := no_memory + no_time:
        text = f"{state.subject(spec)}: " + "; ".join(unmeasured)
        if state.settings.strict:
            raise CeilingExceeded(text) if no_memory else BudgetExceeded(text)
        state.note(spec, item.nodeid, message=text)


def after_teardown(item: pytest.Item) -> None:
    """Close what other tests do not need, and raise CheckRaised once for each load of which a check of ours raised."""
    __tracebackhide__ = True
    state = state_of(item.config)
    load = state.load_of(item)
    loads = dict.fromkeys([*([load] if load is not None else []), *item.stash.get(ASKED_FOR, [])])
    state.finished(item)
    faults = [(each.spec, found) for each in loads for found in each.untold_faults()]
    if faults:
        raise CheckRaised("\n".join(f"{state.subject(spec)}: {found.message}" for spec, found in faults))


def judge_report(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Distinguish failures from errors of the machine, and record the outcome of the load."""
    state = state_of(item.config)
    error = call.excinfo.value if call.excinfo is not None else None
    if report.failed and call.excinfo is not None and _is_ours(error):
        report.longrepr = _shown(item, call.excinfo)
    if report.skipped and SKIP_REASON in item.stash:
        # Where the test stands, not where this plugin decided to skip it.
        report.longrepr = (*_place(item), f"Skipped: {item.stash[SKIP_REASON]}")
    if report.failed and isinstance(error, (MachineError, BaselineError)) and report.when == "call":
        # FAILED means that the model or the libraries changed; this was the machine or the setup.
        report.when = "setup"
    spec = state.loaded_by(item)
    if not report.passed and "llm_load" in item.fixturenames:  # type: ignore[attr-defined]
        # The loads that it would have requested are unknown.
        state.log.tests_left_out = True
    if report.failed:
        _note_failure(item, report, error, spec)
    if spec is None:
        return
    if not report.failed and report.when == "call" and "llm" in item.fixturenames:  # type: ignore[attr-defined]
        state.note(spec, item.nodeid)
    if item.path.is_relative_to(item.config.rootpath):
        state.run(spec).locations[item.nodeid] = f"{state.display(item.path)}:{_place(item)[1]}"
    if call.when == "call":
        # JUnit reads them off the teardown's report, which takes them from the item.
        item.user_properties += junit.properties(state.run(spec))


def _shown(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException]) -> TerminalRepr:
    """Return what pytest shows of an error of this plugin: its text, since the frames it went through say no more."""
    error = excinfo.value
    text = excinfo.getrepr(style="value")
    if text.reprcrash is not None:
        # pytest's short summary repeats all of it in CI, right below the whole text.
        text.reprcrash.message = _cause(str(error))
        if not _is_below(Path(text.reprcrash.path), item.path.parent):
            # It was raised around the test's body, in a file of this plugin or of pytest.
            text.reprcrash.path, text.reprcrash.lineno = _place(item)
    if isinstance(error, (LoadError, MachineError, RemoteError)):
        # It happened in another process: say where the test was meanwhile.
        text.reprtraceback.reprentries = [*_where(item, excinfo), *text.reprtraceback.reprentries]
    return text


def _note_failure(
    item: pytest.Item, report: pytest.TestReport, error: BaseException | None, spec: LoadSpec | None
) -> None:
    """Record a failed test in the log of each load that it requested."""
    outcome = verdicts.ERROR if report.when != "call" else verdicts.FAIL
    message = ""
    if not _is_ours(error):
        crash = getattr(report.longrepr, "reprcrash", None)
        message = f"{item.nodeid}: {crash.message.splitlines()[0]}" if crash is not None and crash.message else ""
    elif not isinstance(error, (LoadError, *_COMPARISONS)):
        # What failed loads and comparisons say is rebuilt from their figures.
        message = str(error).splitlines()[0]
    requested = [load.spec for load in item.stash.get(ASKED_FOR, [])]
    for failed in dict.fromkeys(requested if spec is None else [spec, *requested]):
        state_of(item.config).note(failed, item.nodeid, outcome, message)


def _place(item: pytest.Item) -> tuple[str, int]:
    """Return the file of a test, and its line, counted from 1."""
    path, line, _ = item.reportinfo()
    return str(path), (line or 0) + 1


def _is_below(path: Path, folder: Path) -> bool:
    installed = any(packages in path.as_posix() for packages in INSTALLED)
    return path.is_absolute() and path.is_relative_to(folder) and not installed


def _cause(text: str) -> str:
    """Return the line of a failure that pytest's short summary shows: what changed and why, then what it is about."""
    lines = text.splitlines() or [""]
    head, *rows = (" ".join(line.split()) for line in lines)
    begins = next((index for index, row in enumerate(rows) if row.startswith("because ")), len(rows))
    # A library's error may have its reason on its second line.
    because = " ".join(rows[begins : begins + (2 if rows[begins:] and rows[begins].endswith(":") else 1)])
    # The rows of a failure are indented; else a log or a traceback follows.
    first = rows[0] if begins > 0 and rows and lines[1].startswith("  ") else ""
    cause = ", ".join(filter(None, (first, because)))
    return f"{cause} ({head})" if cause else head


def _where(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException]) -> list[ReprEntry]:
    """Return the lines of the test, and of what it called, that led to this plugin's error; none before its body."""
    state = state_of(item.config)
    entries = list(excinfo.traceback)
    begin = next((index for index, entry in enumerate(entries) if entry.path == item.path), len(entries))
    own = [entry for entry in entries[begin:] if not entry.frame.f_globals["__name__"].startswith("pytest_llmload.")]
    places = [(state.display(Path(entry.path)), entry.lineno + 1, f"in {entry.name}") for entry in own]
    return [ReprEntry([], None, None, ReprFileLocation(*place), "short") for place in places]


def _is_ours(error: BaseException | None) -> bool:
    return isinstance(error, LLMLoadError)
