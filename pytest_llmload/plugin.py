"""Hooks and fixtures of pytest-llmload. What they do is in ``host/``, imported when the first test needs a load."""

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
    options.register(parser)


@pytest.hookimpl(trylast=True)
def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser, args: list[str]) -> None:
    options.register_short(early_config, parser, args)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    options.answer_for_short(config)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    from pytest_llmload.host.hooks import hookspecs

    pluginmanager.add_hookspecs(hookspecs)


def pytest_configure(config: pytest.Config) -> None:
    from pytest_llmload.host.markers import table

    for line in table.lines():
        config.addinivalue_line("markers", line)
    if config.pluginmanager.hasplugin("xdist"):
        from pytest_llmload.integrations import xdist

        config.pluginmanager.register(xdist.Integration(config), "llmload-xdist")
    from pytest_llmload.integrations import reporters

    reporters.register(config)
    if config.pluginmanager.hasplugin("benchmark"):
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
    from pytest_llmload.host.hooks import header

    return header.lines(config)


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    from pytest_llmload.host.hooks.grouping import Grouping

    # Registered this late, its ordering wraps those of --ff, --lf, pytest-randomly and the rest.
    session.config.pluginmanager.register(Grouping(session.config), "llmload-grouping")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.parent.name != "suite" or not file_path.name.startswith("test_llmload_"):
        return None
    from pytest_llmload.host.hooks import collecting

    return collecting.suite_module(file_path, parent)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "llm_spec" in metafunc.fixturenames:
        from pytest_llmload.host.hooks import collecting

        collecting.generate(metafunc)


def pytest_itemcollected(item: pytest.Item) -> None:
    names = getattr(item, "fixturenames", ())
    # An ``llm`` without an ``llm_spec`` is somebody else's fixture.
    if {"llm", "llm_spec"} <= set(names) or "llm_load" in names:
        item.add_marker("llmload")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if not report.passed and (state := existing_state(collector.config)) is not None:
        state.log.tests_left_out = True
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if existing_state(config) is not None:
        from pytest_llmload.host.hooks import collecting

        collecting.validate(config, items)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    if (state := existing_state(config)) is None:
        return []
    from pytest_llmload.host.hooks import header

    return header.missing_baselines(state)


# Inside the other wrappers: whoever sets something up for the item gets to tear it down when it is skipped.
@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    __tracebackhide__ = True
    if not _uses_loads(item):
        return (yield)
    from pytest_llmload.host.hooks import running

    return (yield from running.around_setup(item))


# Inside the other wrappers: they count on the call having begun when it fails, as pytest-json-report does.
@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    __tracebackhide__ = True
    if not _uses_loads(item):
        return (yield)
    from pytest_llmload.host.hooks import running

    return (yield from running.around_call(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
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
    report = yield
    if _uses_loads(item):
        from pytest_llmload.host.hooks import running

        running.judge_report(item, call, report)
    return report


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    if not report.nodeid.startswith("llmload::"):
        return None
    # A verdict about the whole run is an error, but no step of the progress line: it gets its word only afterwards.
    state = existing_state(config)
    known = state is not None and report.nodeid in state.session_errors
    return "error", "", "ERROR" if known else ""


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if (state := existing_state(session.config)) is not None:
        from pytest_llmload.host.hooks import finishing

        finishing.finish(session, state)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if (state := existing_state(config)) is not None:
        from pytest_llmload.host.hooks import finishing

        finishing.summarise(terminalreporter, state)


def pytest_unconfigure(config: pytest.Config) -> None:
    if (state := existing_state(config)) is not None:
        state.broker.close()


def _uses_loads(item: pytest.Item) -> bool:
    """Whether a test asks us for a load, or for the GPUs that loads go to."""
    return not {"llm_spec", "llm_load", "llm_gpus"}.isdisjoint(getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def llm_spec(request: pytest.FixtureRequest) -> LoadSpec:
    """The frozen LoadSpec of this test's load, from its markers and options; loads nothing."""
    from pytest_llmload.host.run.stash import state_of

    if not hasattr(request, "param"):
        pytest.fail(
            "llm and llm_spec have to be arguments of the test, or of a fixture that it names as an argument: "
            "request.getfixturevalue() comes too late to say what to load",
            pytrace=False,
        )
    return state_of(request.config).specs[request.param]


@pytest.fixture(scope="session")
def llm(llm_spec: LoadSpec, request: pytest.FixtureRequest) -> LLM:
    """The model, loaded as the test's markers say: figures, .generate(text) and .run(function)."""
    from pytest_llmload.host.hooks import running

    return running.acquire(request.config, llm_spec)


@pytest.fixture
def memory_baseline(request: pytest.FixtureRequest) -> MemoryBaseline:
    """.check(llm): compare memory, manifest and numbers with the baseline in git."""
    from pytest_llmload.host.checks.baselines import MemoryBaseline

    return MemoryBaseline.of(request.config, request.node)


@pytest.fixture
def latency_baseline(request: pytest.FixtureRequest) -> LatencyBaseline:
    """.check(llm): compare load time, time to first token and time per token with the baseline in git."""
    from pytest_llmload.host.checks.baselines import LatencyBaseline

    return LatencyBaseline.of(request.config, request.node)


@pytest.fixture
def llm_load(request: pytest.FixtureRequest) -> Generator[Callable[..., LLM], None, None]:
    """A factory: llm_load(quant="nf4", …) loads at once, and closes the load at the end of the test."""
    from pytest_llmload.host.hooks.factory import Factory

    factory = Factory(request.config, request.node)
    yield factory
    factory.close()


@pytest.fixture(scope="session")
def llm_gpus(request: pytest.FixtureRequest) -> tuple[Gpu, ...]:
    """The GPUs that this run may use, as the driver describes them; empty on a CPU run."""
    from pytest_llmload.host.run.stash import state_of

    return state_of(request.config).device.gpus


@pytest.fixture
def llm_benchmark() -> NoReturn:
    """llm_benchmark(function, *args, rounds=5, warmup_rounds=1): llm.run for pytest-benchmark, timed in its process."""
    pytest.skip("llm_benchmark needs pytest-benchmark: pip install 'pytest-llmload[benchmark]'")
