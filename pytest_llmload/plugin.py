"""Hooks and fixtures of pytest-llmload. Their code is in ``host/``, imported when the first test needs a load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from pytest_llmload.host.run.stash import existing_state
from pytest_llmload.host.settings import options

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from pytest_llmload.core.job import Gpu
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.checks.baselines import LatencyBaseline, MemoryBaseline
    from pytest_llmload.host.loads.llm import LLM


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options ``--llmload-*``.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_addoption
    """
    options.register(parser)


@pytest.hookimpl(trylast=True)
def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser, args: list[str]) -> None:
    """Add ``--llm-*`` and the ini settings, once other plugins and conftests have added theirs.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_load_initial_conftests
    """
    options.register_short(early_config, parser, args)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let ``config.getoption`` answer for short options that were not given.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_cmdline_main
    """
    options.answer_for_short(config)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Add this plugin's own hooks.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_addhooks
    """
    from pytest_llmload.host.hooks import hookspecs

    pluginmanager.add_hookspecs(hookspecs)


def pytest_configure(config: pytest.Config) -> None:
    """Register markers and integrations, and refuse wrong options before any test is collected.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_configure
    """
    from pytest_llmload.host.markers import table

    for line in table.lines():
        config.addinivalue_line("markers", line)
    if config.pluginmanager.hasplugin("xdist"):
        from pytest_llmload.integrations import xdist

        config.pluginmanager.register(xdist.Integration(config), "llmload-xdist")
    from pytest_llmload.integrations import reporters

    reporters.register(config)
    if config.pluginmanager.hasplugin("benchmark") or config.pluginmanager.hasplugin("codspeed"):
        from pytest_llmload.integrations import benchmark

        # Its fixture llm_benchmark overrides the one below.
        config.pluginmanager.register(benchmark, "llmload-benchmark")
    if options.given(config) or config.getoption(options.dest("report")):
        from pytest_llmload.host.run.stash import state_of

        state_of(config)
    elif options.any_given(config):
        # A wrong option is an error at once, and not when the first test requests a load.
        from pytest_llmload.host.settings.probes import OwnProbes
        from pytest_llmload.host.settings.settings import resolve

        resolve(config, OwnProbes(config).table)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Return the lines that name the models, the baselines and the mode of the run.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_report_header
    """
    from pytest_llmload.host.hooks import header

    return header.lines(config)


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Register the ordering by load, later than every other plugin.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_sessionstart
    """
    from pytest_llmload.host.hooks.grouping import Grouping

    # Registered this late, its ordering wraps those of --ff, --lf, pytest-randomly and the rest.
    session.config.pluginmanager.register(Grouping(session.config), "llmload-grouping")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect the ready-made suite, independent of the setting ``python_files``.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_collect_file
    """
    if file_path.parent.name != "suite" or not file_path.name.startswith("test_llmload_"):
        return None
    from pytest_llmload.host.hooks import collecting

    return collecting.suite_module(file_path, parent)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise a test by the loads that its markers and the options request.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_generate_tests
    """
    if "llm_spec" in metafunc.fixturenames:
        from pytest_llmload.host.hooks import collecting

        collecting.generate(metafunc)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark tests that use a load with ``llmload``.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_itemcollected
    """
    names = getattr(item, "fixturenames", ())
    # An ``llm`` without an ``llm_spec`` is a different plugin's fixture.
    if {"llm", "llm_spec"} <= set(names) or "llm_load" in names:
        item.add_marker("llmload")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Note that tests are missing if a file cannot be collected, so that no baseline is called stale.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_make_collect_report
    """
    report = yield
    if not report.passed and (state := existing_state(collector.config)) is not None:
        state.log.tests_left_out = True
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse markers that are wrong or would be ignored.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_collection_modifyitems
    """
    if existing_state(config) is not None:
        from pytest_llmload.host.hooks import collecting

        collecting.validate(config, items)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Return the lines that say which baselines are missing, and which marks keep tests of one load apart.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_report_collectionfinish
    """
    if (state := existing_state(config)) is None:
        return []
    from pytest_llmload.host.hooks import header

    return [*header.order(state), *header.missing_baselines(state)]


# Inside the other wrappers, so that a plugin that has set something up for the item also tears it down after a skip.
@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Skip a test whose load cannot run here, and keep the error of a failed load for the call.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_runtest_setup
    """
    __tracebackhide__ = True
    if not _uses_loads(item):
        return (yield)
    from pytest_llmload.host.hooks import running

    return (yield from running.around_setup(item))


# Inside the other wrappers, since they (such as pytest-json-report) assume that a call that fails has begun.
@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Raise the load's error before the test's body, and CeilingExceeded or BudgetExceeded after it.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_runtest_call
    """
    __tracebackhide__ = True
    if not _uses_loads(item):
        return (yield)
    from pytest_llmload.host.hooks import running

    return (yield from running.around_call(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Close a load after its last test.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_runtest_teardown
    """
    try:
        return (yield)
    finally:
        if _uses_loads(item):
            from pytest_llmload.host.hooks import running

            running.after_teardown(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report errors of the machine as errors, and this plugin's failures as texts without internal frames.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_runtest_makereport
    """
    report = yield
    if _uses_loads(item):
        from pytest_llmload.host.hooks import running

        running.judge_report(item, call, report)
        if call.when == "teardown":
            from pytest_llmload.host.hooks import finishing

            finishing.write_progress(item.config)
    return report


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """End every process of the run once its tests are over, before pytest-cov gathers what they executed.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_runtestloop
    """
    try:
        return (yield)
    finally:
        if (state := existing_state(session.config)) is not None:
            state.broker.close()


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    """Return the status of errors about the run as a whole.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_report_teststatus
    """
    if not report.nodeid.startswith("llmload::"):
        return None
    # A verdict about the whole run is an error, but not a step of the progress line, so it has no letter there.
    state = existing_state(config)
    known = state is not None and report.nodeid in state.session_errors
    return "error", "", "ERROR" if known else ""


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Judge the run as a whole and write the reports.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_sessionfinish
    """
    if (state := existing_state(session.config)) is not None:
        from pytest_llmload.host.hooks import finishing

        finishing.finish(session, state)


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table of loads.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_terminal_summary
    """
    if (state := existing_state(config)) is not None:
        from pytest_llmload.host.hooks import finishing

        finishing.summarise(terminalreporter, state)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the processes of a run that has run no tests.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_unconfigure
    """
    if (state := existing_state(config)) is not None:
        state.broker.close()


def _uses_loads(item: pytest.Item) -> bool:
    """Return whether a test requests a load, or the GPUs that loads use."""
    return not {"llm_spec", "llm_load", "llm_gpus"}.isdisjoint(getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def llm_spec(request: pytest.FixtureRequest) -> LoadSpec:
    """The frozen LoadSpec of this test's load, from its markers and options; it does not load the model.

    A test fails if it requests the fixture by ``request.getfixturevalue``: that is too late to parametrise it.
    """
    from pytest_llmload.host.run.stash import state_of

    if not hasattr(request, "param"):
        pytest.fail(
            "llm and llm_spec must be arguments of the test, or of a fixture that it names as an argument: "
            "request.getfixturevalue() comes too late to choose what to load",
            pytrace=False,
        )
    return state_of(request.config).specs[request.param]


@pytest.fixture(scope="session")
def llm(llm_spec: LoadSpec, request: pytest.FixtureRequest) -> LLM:
    """The model, loaded as the test's markers say: figures, .generate(text) and .run(function).

    All tests of one spec share one load. Its figures are taken on the workload before any test code runs. The error of
    a failed load, a LoadError, is raised when the test is called; MachineError is raised here.
    """
    from pytest_llmload.host.hooks import running

    return running.acquire(request.config, llm_spec)


@pytest.fixture
def memory_baseline(request: pytest.FixtureRequest) -> MemoryBaseline:
    """.check(llm): compare memory, manifest and numbers with the baseline in git.

    Raises BaselineError if the baseline's file cannot be read. ``check`` raises MemoryRegressed, BaselineMissing or
    BaselineIncomparable, each with the command that accepts or records.
    """
    from pytest_llmload.host.checks.baselines import MemoryBaseline

    return MemoryBaseline.of(request.config, request.node)


@pytest.fixture
def latency_baseline(request: pytest.FixtureRequest) -> LatencyBaseline:
    """.check(llm): compare load time, time to first token and time per token with the baseline in git.

    The load is timed in further processes until every time is judged, for at most ``--llm-latency-time``. Raises
    BaselineError if the baseline's file cannot be read. ``check`` raises LatencyRegressed, BaselineMissing or
    BaselineIncomparable, each with the command that accepts or records.
    """
    from pytest_llmload.host.checks.baselines import LatencyBaseline

    return LatencyBaseline.of(request.config, request.node)


@pytest.fixture
def llm_load(request: pytest.FixtureRequest) -> Generator[Callable[..., LLM], None, None]:
    """A factory: llm_load(quant="nf4", …) loads at once, and closes the load at the end of the test.

    It takes the markers' keywords, ``model=``, ``options=`` of the strategy, ``env=`` (variables of the load's process)
    and ``shared=True`` (the run's load of an equal spec). It raises the load's error, UsageError for a wrong value and
    TypeError for an unknown keyword, and skips the test if the machine lacks what the load needs.
    """
    from pytest_llmload.host.hooks.factory import Factory

    factory = Factory(request.config, request.node)
    yield factory
    factory.close()


@pytest.fixture(scope="session")
def llm_gpus(request: pytest.FixtureRequest) -> tuple[Gpu, ...]:
    """The GPUs that this run may use, as the driver describes them; empty on a CPU run.

    Each has ``uuid``, ``name``, ``total`` (bytes) and ``capability``. Raises MachineError if the GPU and the build of
    torch do not fit.
    """
    from pytest_llmload.host.run.stash import state_of

    return state_of(request.config).device.gpus


@pytest.fixture
def llm_benchmark() -> NoReturn:
    """llm_benchmark(function, *args, rounds=5, warmup_rounds=1): llm.run for pytest-benchmark, timed in its process."""
    pytest.skip("llm_benchmark needs pytest-benchmark: pip install 'pytest-llmload[benchmark]'")
