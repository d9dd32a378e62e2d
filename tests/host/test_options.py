"""Options: help, precedence, bad values, and giving way to others."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_llmload.host.settings.models import parse_model
from pytest_llmload.host.settings.options import OPTIONS
from pytest_llmload.host.settings.settings import default_cache

pytestmark = pytest.mark.usefixtures("checkpoint_cache")

USES_A_LOAD = "def test_a(llm): pass"


def test_help_lists_every_option_under_its_short_name(project: Callable[..., pytest.RunResult]) -> None:
    text = project("--help", fast=False, cached=False).stdout.str()
    for name in OPTIONS:
        assert f"--llm-{name}" in text
    assert "--llmload-" not in text
    assert "model-loading regression tests" in text


def test_markers_document_themselves(project: Callable[..., pytest.RunResult]) -> None:
    text = project("--markers", fast=False, cached=False).stdout.str()
    for name in ("quant(*schemes", "gpu_count(n)", "memory_ceiling(*, gpu", "workload(text)", "llmload"):
        assert f"@pytest.mark.{name}" in text


def test_a_conftest_that_owns_an_option_keeps_it_and_the_header_says_so(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makeconftest(
        """
        def pytest_addoption(parser):
            parser.addoption("--llm-model", action="store", default="theirs")
            parser.addoption("--llm-timeout", type=int, default=3)
        def pytest_report_header(config):
            return f"their model: {config.getoption('--llm-model')}"
        """
    )
    pytester.makepyfile("def test_a(llm_spec): assert llm_spec.name == 'tiny-gpt2'")
    result = project("--llm-model=x", "--llmload-model=random:tiny-gpt2", "--llm-device=cpu", fast=False)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*their model: x*"])
    result.stdout.fnmatch_lines(["llmload: another plugin or conftest owns*--llm-model is --llmload-model*"])


def test_the_command_line_goes_over_the_ini_file(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makeini("[pytest]\nllm_model = random:tiny-gpt2\nllm_workload = 1x8+2\n")
    pytester.makepyfile(
        """
        def test_a(llm_spec):
            assert (llm_spec.name, str(llm_spec.workload)) == ("tiny-llama", "1x8+3")
        """
    )
    project().assert_outcomes(passed=1)


def test_the_ini_file_alone_is_enough(pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]) -> None:
    pytester.makepyprojecttoml(
        """
        [tool.pytest.ini_options]
        llm_model = ["random:tiny-gpt2", "other=random:tiny-llama"]
        llm_device = "cpu"
        llm_strict = true
        """
    )
    pytester.makepyfile(
        """
        def test_a(llm_spec, pytestconfig):
            assert llm_spec.name in ("tiny-gpt2", "other")
        """
    )
    project(fast=False).assert_outcomes(passed=2)


#: Writes the command of every test of a run, also of one in workers.
COMMANDS = """
    import pathlib
    from pytest_llmload.host.run.stash import state_of
    def pytest_collection_finish(session):
        state = state_of(session.config)
        lines = [state.command(item, state.spec_of(item)) for item in session.items]
        if lines:
            pathlib.Path(__file__).with_name("commands.txt").write_text("\\n".join(lines))
"""


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "workers"])
@pytest.mark.parametrize(
    ("arguments", "ini"),
    [
        (("--pyargs", "pytest_llmload.suite", "--llm-strategy=nf4", "-k", "generates and dq"), "check_*.py"),
        (("--pyargs", "pytest_llmload.suite", "--llm-strategy=nf4", "-k", "generates and dq"), "test_*.py"),
        (("test_it.py", "-k", "one and nf4"), "test_*.py"),
        (("test_it.py", "-k", "one and nf4 and llama", "--llm-model", "other=random:tiny-gpt2"), "test_*.py"),
    ],
    ids=["suite-other-files", "suite", "own", "own-of-two-models"],
)
def test_the_command_selects_the_one_test_from_where_the_run_was_started(
    pytester: pytest.Pytester,
    project: Callable[..., pytest.RunResult],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    ini: str,
    workers: tuple[str, ...],
) -> None:
    pytester.makeini(f"[pytest]\npython_files = {ini}\n")
    pytester.makeconftest(COMMANDS)
    below = pytester.mkdir("below")
    (below / "test_it.py").write_text(
        "import pytest\n@pytest.mark.quant('nf4', 'int8')\nclass TestIt:\n    def test_one(self, llm): pass\n"
    )
    if "--pyargs" not in arguments:
        monkeypatch.chdir(below)
    project(*arguments, *workers, "--setup-plan", preset=True)
    (command,) = (pytester.path / "commands.txt").read_text().splitlines()
    assert command.count("--llm-model") == command.count("--llm-model=random:tiny-llama") == 1
    assert command.endswith("--llm-update-baselines")
    program, *options = shlex.split(command)
    assert program == "pytest"
    again = project(*options, "--collect-only", "-q", fast=False)
    (selected,) = (line for line in again.outlines if "::" in line)
    expected = "test_generates[tiny-llama-nf4-dq]" if "--pyargs" in arguments else "TestIt::test_one[tiny-llama-nf4]"
    assert selected.endswith(f"::{expected}")
    assert again.ret == pytest.ExitCode.OK


def test_directories_in_the_ini_file_are_seen_from_there(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeini("[pytest]\nllm_model = ./checkpoint\nllm_adapter = ./adapter\n")
    for name in ("checkpoint", "adapter", "below"):
        pytester.mkdir(name)
    (pytester.path / "below" / "test_it.py").write_text(
        "def test_a(llm_spec): assert (llm_spec.name, llm_spec.adapter) == ('checkpoint', None)"
    )
    monkeypatch.chdir(pytester.path / "below")
    project("--llm-device=cpu", fast=False).assert_outcomes(passed=1)
    result = project("--llm-model=./checkpoint", fast=False)
    assert "'./checkpoint' is not a directory or GGUF file on this machine" in result.stderr.str()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--llm-workload=8", "--llm-workload: '8' is not a workload: write BATCHxPROMPT+NEW"),
        ("--llm-tolerance=gpu.settled", "--llm-tolerance: 'gpu.settled' is not METRIC=TOLERANCE"),
        ("--llm-tolerance=gpu.setled=1%", "--llm-tolerance: unknown metric 'gpu.setled'"),
        ("--llm-tolerance=gpu.settled=1 percent", "--llm-tolerance: gpu.settled: '1 percent' is not a tolerance"),
        ("--llm-tolerance=load=8MiB", "--llm-tolerance: load: '8MiB' is not a tolerance here: write '1%', '5ms'"),
        ("--llm-timeout=soon", "--llm-timeout: 'soon' is not a time"),
        ("--llm-record-repeats=0", "--llm-record-repeats: '0' is not a number of loads"),
        ("--llm-report=run.txt", "--llm-report: 'run.txt'"),
        ("--llm-baseline-variant=../up", "--llm-baseline-variant"),
        ("--llm-model=..up=random:tiny-llama", "--llm-model: '..up' cannot name a model"),
        (
            "--llm-model=../up=random:tiny-llama",
            "'../up=random:tiny-llama' is not a directory or GGUF file on",
        ),
        ("--llm-model=random:nothing-like-it", "random:nothing-like-it"),
        ("--llm-model=./nowhere", "--llm-model: './nowhere' is not a directory or GGUF file on this machine"),
        ("--llm-model=a b", "--llm-model: 'a b' is neither a directory on this machine nor a hub id"),
        ("--llm-strategy=int4", "unknown 'int4'; use one of"),
        ("--llm-model=~nosuch/x", "--llm-model: '~nosuch/x' begins with a home directory that this machine does not"),
        ("--llm-cache-dir=~nosuch/x", "--llm-cache-dir: '~nosuch/x' begins with a home directory"),
        ("--llm-baselines=~nosuch/x", "--llm-baselines: '~nosuch/x' begins with a home directory"),
        ("--llm-adapter=~nosuch/x", "--llm-adapter: '~nosuch/x' begins with a home directory"),
        (f"--llm-model={'m' * 300}", "is not a path that can be read: File name too long"),
        (f"--llm-model=random:{'m' * 300}", "is not a path that can be read: File name too long"),
        (f"--llm-model={'m' * 300}=random:tiny-llama", "cannot name a model: it becomes a folder"),
        ("--llm-timeout=0", "--llm-timeout: '0' leaves no time to load anything: write more than 0s"),
        ("--llm-loader=nocolon", "--llm-loader: 'nocolon' names no function: write MODULE:FUNCTION"),
    ],
)
def test_a_wrong_value_is_one_sentence(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], option: str, message: str
) -> None:
    pytester.makepyfile(USES_A_LOAD)
    result = project(option, cached="cache-dir" not in option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in result.stderr.str()
    assert "Traceback" not in result.stderr.str() + result.stdout.str()


def test_two_models_of_one_name_are_refused(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(USES_A_LOAD)
    result = project("--llm-model=tiny-llama=random:tiny-gpt2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "are both called 'tiny-llama'" in result.stderr.str()


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="before pytest 9 every value of the ini file is a text")
def test_wrong_types_in_the_ini_file_are_usage_errors(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyprojecttoml("[tool.pytest]\nllm_workload = 5\nllm_model = ['random:tiny-llama']\n")
    pytester.makepyfile(USES_A_LOAD)
    result = project(fast=False)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "llm_workload" in result.stderr.str()


def test_numbers_in_the_ini_file_need_no_unit(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    table = "tool.pytest" if pytest.version_tuple >= (9, 2) else "tool.pytest.ini_options"
    pytester.makepyprojecttoml(f"[{table}]\nllm_timeout = 30\nllm_record_repeats = 3\nllm_wait_gpu = 0.5\n")
    pytester.makepyfile(
        """
        from pytest_llmload.host.settings.settings import resolve
        def test_a(pytestconfig):
            settings = resolve(pytestconfig)
            assert (settings.timeout, settings.record_repeats, settings.wait_gpu) == (30, 3, 0.5)
        """
    )
    project(fast=False).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("ini", "options", "message"),
    [
        ("llm_workload = 1x8", (), "llm_workload: '1x8' is not a workload"),
        ("llm_strict = maybe", (), "llm_strict in "),
        ("", ("--llm-baseline-variant=../x",), "--llm-baseline-variant: '../x' cannot be a baseline variant"),
        ("", ("--llm-workload=8",), "--llm-workload: '8' is not a workload"),
    ],
)
def test_what_is_wrong_is_said_before_any_test_runs_whether_it_loads_or_not(
    pytester: pytest.Pytester,
    project: Callable[..., pytest.RunResult],
    ini: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    pytester.makeini(f"[pytest]\n{ini}\n")
    pytester.makepyfile("def test_plain(): pass")
    result = project(*options, fast=False, cached=False)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in result.stderr.str()
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()


def test_an_ini_setting_of_another_plugin_is_left_alone_and_the_header_says_so(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makeini("[pytest]\nllm_strict = nobody knows\nllm_workload = theirs\n")
    pytester.makeconftest(
        """
        def pytest_addoption(parser):
            parser.addini("llm_model", "the judge", default="gpt-4")
            parser.addini("llm_strict", "theirs", type="bool")
            parser.addini("llm_workload", "theirs")
        """
    )
    pytester.makepyfile(
        """
        from pytest_llmload.host.settings.settings import resolve
        def test_a(pytestconfig):
            assert (pytestconfig.getini("llm_model"), pytestconfig.getini("llm_workload")) == ("gpt-4", "theirs")
            settings = resolve(pytestconfig)
            assert (settings.models, settings.strict, str(settings.workload)) == ([], False, "1x128+32")
        """
    )
    result = project(fast=False, cached=False)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["llmload: *owns some of our ini settings: llm_model is --llm-model, llm_workload is *"]
    )


def test_a_conftest_further_down_may_own_an_option(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    sub = pytester.mkdir("sub")
    (sub / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--llm-model', default='theirs')")
    (sub / "test_it.py").write_text(
        "def test_a(pytestconfig): assert pytestconfig.getoption('--llm-model', 'unset') in ('theirs', None)"
    )
    project(fast=False, cached=False).assert_outcomes(passed=1)
    project("--llm-device", "cpu", fast=False, cached=False).assert_outcomes(passed=1)


def test_our_options_are_there_however_they_are_given(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makeini("[pytest]\naddopts = --llm-device cpu\n")
    pytester.makeconftest(
        """
        def pytest_configure(config):
            assert config.getoption("--llm-strict") is False
            assert config.getoption("--llm-update-baselines") is None
        """
    )
    (pytester.path / "arguments.txt").write_text("--llm-model=random:tiny-llama")
    pytester.makepyfile("def test_a(llm_spec): assert llm_spec.name == 'tiny-llama'")
    project("@arguments.txt", "--no-llm-strict", fast=False).assert_outcomes(passed=1)


def test_a_committed_suite_without_a_model_matters_only_where_it_would_run(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(test_suite="from pytest_llmload.suite import *", test_own="def test_plain(): pass")
    project("-m", "not llmload", fast=False).assert_outcomes(passed=1, deselected=2)
    project("-k", "plain", "-n", "1", fast=False).assert_outcomes(passed=1)
    for workers in ((), ("-n", "1")):
        result = project(*workers, fast=False)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert result.stderr.str().count("the ready-made suite needs a model") == 1


def test_a_user_without_a_home_has_a_cache_for_built_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(cls: type[Path]) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(nobody))
    assert default_cache().is_relative_to(tempfile.gettempdir())


def test_a_model_is_called_after_its_directory(tmp_path: Path) -> None:
    (tmp_path / "ckpt-3.1").mkdir()
    (tmp_path / "ckpt-3.1" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "lr=1e-4" / "ckpt").mkdir(parents=True)
    for spec, name in {
        "random:./ckpt-3.1": "ckpt-3.1",
        "random:./ckpt-3.1/config.json": "ckpt-3.1",
        "./lr=1e-4/ckpt": "ckpt",
        "mine=./lr=1e-4/ckpt": "mine",
    }.items():
        assert parse_model(spec, tmp_path).name == name


def test_without_a_model_tests_are_skipped_with_one_reason_and_the_suite_is_an_error(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.quant("nf4", "int8")
        def test_a(llm): pass
        def test_b(llm_load): llm_load(quant="nf4")
        def test_c(): pass
        """
    )
    result = project("-rs", fast=False)
    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED*no model to load: give --llm-model=SPEC"])
    result = project("--pyargs", "pytest_llmload.suite", fast=False)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "the ready-made suite needs a model" in result.stderr.str()


def _linked(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to(folder.parent / "elsewhere")


def _open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def _of_another_user(folder: Path) -> None:
    folder.mkdir()
    try:
        os.chown(folder, 12345, 12345)
    except PermissionError:
        pytest.skip("only root can give a folder to another user")


@pytest.mark.parametrize("prepare", [_linked, _open_to_all, _of_another_user, Path.touch])
def test_a_cache_that_another_user_may_have_prepared_is_refused(
    prepare: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a home, the cache lies in a folder that all users share, by a name that everyone can guess."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert default_cache() == tmp_path / f"pytest-llmload-{os.getuid()}" / "cache"
    assert default_cache().parent.stat().st_mode & 0o777 == 0o700
    default_cache().parent.rmdir()
    prepare(tmp_path / f"pytest-llmload-{os.getuid()}")
    with pytest.raises(pytest.UsageError, match=r"is not a folder that only this user can write.*--llm-cache-dir"):
        default_cache()
