"""A user's project to run the plugin in, as a user would: by the command line, in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from warm_template import SERVERS, Template

from pytest_llmload.system.garbage import freeze

#: Small enough for two cores, and a workload of its own where figures are compared.
MODEL = "--llm-model=random:tiny-llama"
FAST = (MODEL, "--llm-device=cpu", "--llm-workload=1x16+4")


@pytest.fixture(autouse=True)
def _earlier_objects_frozen() -> None:
    """Freeze what exists before a test, for good: each load collects garbage, which would take most of its time."""
    freeze()


@pytest.fixture(scope="session")
def checkpoint_cache() -> Path:
    """Return the folder in which every run of this session keeps the checkpoints that it builds."""
    return Path(os.environ["LLMLOAD_TEST_CACHE"])


@pytest.fixture(scope="session")
def warm_template() -> Iterator[Template]:
    """Return the process from which runs are forked."""
    template = Template()
    yield template
    template.close()


@pytest.fixture
def forked_python(warm_template: Template, tmp_path: Path) -> Path:
    """Return a ``python`` for scripts, whose runs of pytest are forked as those of ``project`` are."""
    return warm_template.write_python(tmp_path / "forked_python")


@pytest.fixture
def project(
    pytester: pytest.Pytester, checkpoint_cache: Path, monkeypatch: pytest.MonkeyPatch, warm_template: Template
) -> Callable[..., pytest.RunResult]:
    """Run pytest in the test's folder; ``fast=True`` (the default) loads tiny-llama on the CPU.

    The run is forked from a process that has imported torch and transformers, unless the test asks for a ``cold`` one.
    """
    for name in ("PYTEST_ADDOPTS", "CI", "COLUMNS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    start = pytester.popen

    def popen(command: Any, servers: int, **keywords: Any) -> Any:
        environment = dict(os.environ)
        if not warm_template.starts_alike(environment):
            return start(command, **keywords)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), environment.get("PYTHONPATH")]))
        output = (keywords["stdout"].fileno(), keywords["stderr"].fileno())
        return warm_template.popen(command[3:], cwd=Path.cwd(), environment=environment, output=output, servers=servers)

    def run(
        *arguments: str,
        fast: bool = True,
        cached: bool = True,
        randomly: bool = False,
        cold: bool = False,
        servers: int = SERVERS,
    ) -> pytest.RunResult:
        options = [*(FAST if fast else ()), *arguments]
        if cached:
            options.append(f"--llmload-cache-dir={checkpoint_cache}")
        # pytest-randomly imports what other packages give it to seed, torch among it: only where a test is about it.
        options += [] if randomly else ["-p", "no:randomly"]
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
