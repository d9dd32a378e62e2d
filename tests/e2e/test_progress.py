"""A live line on a terminal, plain lines elsewhere, nothing under ``-q``; with and without xdist."""

from __future__ import annotations

import os
import pty
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import Hub, serving
from warm_template import Template

from pytest_llmload.host.loads.progress import Step
from pytest_llmload.host.run.progress import LiveLine
from pytest_llmload.worker.checkpoints.resolve import resolve

Project = Callable[..., pytest.RunResult]

#: A load that lasts until pytest has shown how far it is.
LOADER = """
    from transformers import AutoModelForCausalLM

    def load(spec):
        model = AutoModelForCausalLM.from_pretrained(spec.model)
        with open("shown", "rb", buffering=0) as shown:
            shown.read(1)
        return model
"""
#: Ends that load. Under -q nothing is to be shown: it ends once it has begun, or once a worker has handed its step on.
SHOWN = """
    import os
    from pytest_llmload.host.loads.progress import Watch
    from pytest_llmload.host.run.progress import LiveLine, PlainLines
    from pytest_llmload.integrations.xdist_progress import WorkerDisplay

    def end_load():
        # Opened for reading too: it waits for no reader, and keeps the byte.
        os.write(os.open("shown", os.O_RDWR), b".")

    def ends_load(show):
        def shown(display, step):
            show(display, step)
            if step.phase == "load":
                end_load()
        return shown

    def entered(watch, message, original=Watch.entered):
        original(watch, message)
        if message["phase"] == "load" and not watch.interval:
            end_load()

    def pytest_configure(config):
        Watch.entered = entered
        for display in (LiveLine, PlainLines, *([WorkerDisplay] if config.get_verbosity() < 0 else [])):
            display.show = ends_load(display.show)
"""
TEST = """
    import pytest

    @pytest.mark.strategy("loader", target="slow:load")
    def test_slow(llm): pass
"""
#: Plain lines at once and often, as those of a load that takes minutes.
OFTEN = """
    from pytest_llmload.host.run import progress
    progress.FIRST, progress.EVERY = 0.0, 0.5
"""


@pytest.fixture
def slow(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makepyfile(slow=LOADER)
    pytester.makepyfile(TEST)
    pytester.makeconftest(SHOWN)
    os.mkfifo(pytester.path / "shown")
    monkeypatch.setenv("PYTHONPATH", str(pytester.path))


def on_a_terminal(folder: Path, template: Template, cache: Path, *arguments: str, **environ: str) -> str:
    """Run pytest on a terminal of its own; return all that it wrote to it."""
    base = {name: value for name, value in os.environ.items() if name not in ("CI", "COLUMNS", "PYTEST_ADDOPTS")}
    parent, child = pty.openpty()
    options = ["--llm-model=random:tiny-llama", "--llm-device=cpu", "--llm-workload=1x8+3", "-p", "no:randomly"]
    run = template.popen(
        [*options, f"--llm-cache-dir={cache}", *arguments],
        cwd=folder,
        environment={**base, "TERM": "xterm", **environ},
        output=(child, child),
    )
    os.close(child)
    read = bytearray()
    while data := _read(parent):
        read += data
    os.close(parent)
    assert run.wait() == 0, read.decode()
    return read.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux says so once the other side is closed
        return b""


LIVE = re.compile(r"\n\r\x1b\[2K(?P<text>[^\x1b]*)\x1b\[A\x1b\[(?P<column>\d+)G")


@pytest.mark.usefixtures("slow")
def test_a_terminal_has_one_line_that_is_gone_before_pytest_goes_on(
    pytester: pytest.Pytester, warm_template: Template, checkpoint_cache: Path
) -> None:
    written = on_a_terminal(pytester.path, warm_template, checkpoint_cache).replace("\r\n", "\n")
    lines = [found["text"] for found in LIVE.finditer(written)]
    during = [text for text in lines if ": load, " in text]
    assert during
    assert all(re.fullmatch(r"llmload: tiny-llama-loader\S*: load, (.* of .*, )?[\d.]+ m?s", text) for text in during)
    # Without the line, pytest's own output is what it would be.
    assert lines[-1] == ""
    rest = LIVE.sub("", written)
    assert "llmload: tiny-llama-loader" not in rest
    assert re.search(r"terminal_has\S+\.py \S*\.", rest)
    assert {int(found["column"]) for found in LIVE.finditer(written)} == {len(f"{lines and _file(rest)} ") + 1}


def _file(text: str) -> str:
    found = re.search(r"^(\S+\.py) ", text, re.MULTILINE)
    assert found
    return found[1]


@pytest.mark.usefixtures("slow")
def test_a_terminal_has_one_line_for_all_workers(
    pytester: pytest.Pytester, warm_template: Template, checkpoint_cache: Path
) -> None:
    written = on_a_terminal(pytester.path, warm_template, checkpoint_cache, "-n2", "-p", "xdist")
    lines = [found["text"] for found in LIVE.finditer(written.replace("\r\n", "\n"))]
    assert [text for text in lines if re.match(r"llmload: tiny-llama-loader\S*: load, ", text)]
    assert lines[-1] == "", "it is gone before pytest goes on"
    rest = LIVE.sub("", written.replace("\r\n", "\n"))
    assert "llmload: tiny-llama-loader" not in rest


def test_two_loads_share_the_live_line(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    written: list[str] = []
    line = LiveLine(pytestconfig)
    monkeypatch.setattr(line, "_write", written.append)
    monkeypatch.setattr(type(pytestconfig.get_terminal_writer()), "fullwidth", 200)
    line.show(Step("a", "load", 2.0, 1 << 20, 4 << 20), Step("b", "page_cache", 61.0))
    assert written == ["llmload: a: load, 1.00 MiB of 4.00 MiB, 2.00 s · b: page cache, 61.00 s"]


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(("arguments", "environ"), [(("-q",), {}), ((), {"CI": "true"}), ((), {"TERM": "dumb"})])
def test_no_line_is_overwritten_where_that_is_not_wanted(
    pytester: pytest.Pytester,
    warm_template: Template,
    checkpoint_cache: Path,
    arguments: tuple[str, ...],
    environ: dict[str, str],
) -> None:
    written = on_a_terminal(pytester.path, warm_template, checkpoint_cache, *arguments, **environ)
    assert not LIVE.search(written)
    assert ": load, " not in written, "a load of a second needs no plain line"


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("workers", [(), ("-n2", "-p", "xdist")], ids=["one", "xdist"])
def test_a_log_has_plain_lines(pytester: pytest.Pytester, project: Project, workers: tuple[str, ...]) -> None:
    pytester.makeconftest(textwrap.dedent(OFTEN) + textwrap.dedent(SHOWN))
    result = project(*workers)
    result.assert_outcomes(passed=1)
    lines = [line for line in result.outlines if re.match(r"llmload: tiny-llama-loader\S*: load, .*[\d.]+ m?s$", line)]
    assert 1 <= len(lines) <= 8
    assert "\x1b" not in result.stdout.str()
    silent = project(*workers, "-q")
    assert "llmload: tiny-llama-loader" not in silent.stdout.str()


def test_a_download_is_said_and_is_in_no_load(
    pytester: pytest.Pytester,
    project: Project,
    checkpoint_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytester.makepyfile("def test_load(llm): assert 'download' not in llm.timing.phases and llm.timing.phases")
    built = Path(resolve("random:tiny-llama", checkpoint_cache).path)
    Hub.files = {path.name: path.read_bytes() for path in built.iterdir()}
    for name in ("HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(pytester.path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    options = ("--llm-model=org/model", "--llm-device=cpu", "--llm-workload=1x8+3")
    with serving() as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        first = project(*options, fast=False)
    first.assert_outcomes(passed=1)
    first.stdout.re_match_lines([r"llmload: org/model: download, 15\.\d+ MiB, .*s$"])
    assert "model.safetensors" in Hub.asked
    # The hub is away now, and every file is here: nothing is downloaded, by the load neither.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = project(*options, fast=False)
    again.assert_outcomes(passed=1)
    assert ": download, " not in again.stdout.str()
