"""A user's project to run the plugin in, as a user would: by the command line, in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from warm_template import ADDRESS, SERVERS, StartsOtherwise, Template, TemplateProcess, write_python

from pytest_llmload.system.garbage import freeze

#: Small enough for two cores: the preset, and a model of its name and architecture with a fifth of its weights.
PRESET = "--llm-model=random:tiny-llama"
SMALL = f"--llm-model=tiny-llama=random:{Path(__file__).parent / 'support' / 'small-llama.json'}"
FAST = ("--llm-device=cpu", "--llm-workload=1x8+3")
#: Plugins of other packages that a run leaves out, unless the test asks for them: they take a quarter of its start.
OTHERS = (
    *("allure_pytest", "anyio", "benchmark", "html", "html_fixtures", "metadata"),
    *("pytest_cov", "pytest_jsonreport", "pytest_order", "rerunfailures"),
)


@pytest.fixture(autouse=True)
def _earlier_objects_frozen() -> None:
    """Freeze what exists before a test, for good: each load collects garbage, which would take most of its time."""
    freeze()


@pytest.fixture(scope="session")
def checkpoint_cache() -> Path:
    """Return the folder in which every run of this session keeps the checkpoints that it builds."""
    return Path(os.environ["LLMLOAD_TEST_CACHE"])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Fork the workers from the template of their runs, so that torch and transformers are imported once for all.

    Coverage counts what a process imports: its workers are started.
    """
    if config.getoption("cov_source", None):
        return
    process = TemplateProcess()
    config.add_cleanup(process.close)
    os.environ[ADDRESS] = process.address
    for spec in specs:
        spec.python = str(write_python(process.address, Path(os.environ["LLMLOAD_TEST_CACHE"]) / "forked_python"))


@pytest.fixture(scope="session")
def template_address() -> Iterator[str]:
    """Return the template's address; start it unless this process was forked from it."""
    if ADDRESS in os.environ:
        yield os.environ[ADDRESS]
        return
    process = TemplateProcess()
    yield process.address
    process.close()


@pytest.fixture(scope="session")
def warm_template(template_address: str) -> Iterator[Template]:
    """Return the process from which runs are forked."""
    template = Template(template_address)
    yield template
    template.close()


@pytest.fixture
def forked_python(template_address: str, tmp_path: Path) -> Path:
    """Return a ``python`` whose runs of code and of our modules are forked as those of ``project`` are."""
    return write_python(template_address, tmp_path / "forked_python")


@pytest.fixture
def project(
    pytester: pytest.Pytester, checkpoint_cache: Path, monkeypatch: pytest.MonkeyPatch, warm_template: Template
) -> Callable[..., pytest.RunResult]:
    """Run pytest in the test's folder; ``fast=True`` (the default) loads a tiny Llama on the CPU, small or the preset.

    The run is forked from a process that has imported torch and transformers, unless the test asks for a ``cold`` one,
    which also has other packages' plugins, but for pytest-randomly.
    """
    for name in ("PYTEST_ADDOPTS", "CI", "COLUMNS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    start = pytester.popen

    def popen(command: Any, servers: int, **keywords: Any) -> Any:
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), environment.get("PYTHONPATH")]))
        output = (keywords["stdout"].fileno(), keywords["stderr"].fileno())
        fork = partial(warm_template.popen, command[3:], cwd=Path.cwd(), output=output, servers=servers)
        try:
            return fork(environment=environment)
        except StartsOtherwise:
            return start(command, **keywords)

    def run(
        *arguments: str,
        fast: bool = True,
        preset: bool = False,
        cached: bool = True,
        randomly: bool = False,
        others: bool = False,
        cold: bool = False,
        servers: int = SERVERS,
    ) -> pytest.RunResult:
        options = [*((PRESET if preset else SMALL, *FAST) if fast else ()), *arguments]
        if cached:
            options.append(f"--llmload-cache-dir={checkpoint_cache}")
        # pytest-randomly imports what other packages give it to seed, torch among it: only where a test is about it.
        left_out = (*(() if randomly else ("randomly",)), *(() if others or cold else OTHERS))
        options += [part for name in left_out for part in ("-p", f"no:{name}")]
        with pytest.MonkeyPatch.context() as patch:
            if not cold:
                patch.setattr(pytester, "popen", partial(popen, servers=servers))
            return pytester.run(sys.executable, "-m", "pytest", *options, timeout=240)

    return run


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for the checkpoints that one module of tests builds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Make every load in this process hand its model to a function before a check sees it."""

    import transformers

    def plant(tamper: Callable[[Any], None]) -> None:
        original = transformers.PreTrainedModel.from_pretrained.__func__

        def loading(cls: type, *args: Any, **kwargs: Any) -> Any:
            given = original(cls, *args, **kwargs)
            tamper(given[0] if isinstance(given, tuple) else given)
            return given

        monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(loading))

    return plant
