"""``llmload doctor``: what people meet before the first load, each found first and with the command that mends it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections import namedtuple
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import Hub, serving

from pytest_llmload.cli import main, plan
from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.job import Gpu
from pytest_llmload.core.presets import PRESETS
from pytest_llmload.host.doctor import disk, examination, gpu, limits, python
from pytest_llmload.host.doctor.finding import ERROR, FINE, WARNING, Finding
from pytest_llmload.host.loads import hardware

H100 = Gpu("GPU-0", "NVIDIA H100 80GB HBM3", 85_029_158_912, (9, 0))
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which no check finds anything, and where pytest is started on it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("SUDO_USER", "PIP_USER"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def first(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """The first finding and the command beside it, of a machine that has an error."""
    assert main(["doctor", *arguments]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ERROR")
    return lines[0], lines[1].strip()


def errors(findings: Iterator[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level != FINE]


def test_a_healthy_machine_has_no_error(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {item["check"] for item in found} >= {"python", "pip", "disk", "torch", "bitsandbytes", "versions", "shm"}
    assert not [item for item in found if item["level"] == ERROR]


def test_a_full_disk_is_named_first(
    healthy: Path, tmpfs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmpfs))
    line, mend = first(capsys)
    assert f"free in {tmpfs} (hub cache): the disk is full" in line
    assert "HF_HOME" in mend


def test_what_the_load_will_write_counts_before_it_starts(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 << 30, 90 << 30, 10 << 30))
    line, mend = first(capsys, "--model", "org/model", "--needs", "24GiB")
    assert "the load needs 24.25 GiB" in line
    assert "10.00 GiB are free (hub cache)" in line
    assert "HF_HOME" in mend
    assert main(["doctor", "--model", "org/model", "--needs", "9GiB"]) == 0
    assert main(["doctor", "--needs", "many"]) == 2


def test_the_download_of_a_hub_model_is_told_before_it_begins(
    healthy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    forked_python: Path,
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Hub.files = {"config.json": json.dumps(PRESETS["tiny-llama"]).encode(), "model.safetensors": b"weights"}
    with serving() as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        Hub.sizes = {"model.safetensors": 1 << 50}
        answers, ask = [], plan.ask

        def asking(*arguments: Any, **keywords: Any) -> Any:
            # The planning process imports torch and transformers.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "executable", str(forked_python))
                answers.append(ask(*arguments, **keywords))
            return answers[-1]

        monkeypatch.setattr(plan, "ask", asking)
        line, mend = first(capsys, "--model", "org/model")
    assert "the load needs 1024.00 TiB in" in line
    assert "HF_HOME" in mend
    assert "model.safetensors" not in Hub.asked
    # The same answer, with a smaller file.
    (told,) = answers
    monkeypatch.setattr(plan, "ask", lambda *_, **__: told | {"download": 3 << 20})
    assert main(["doctor", "--model", "org/model"]) == 0
    assert "(hub cache); the load takes 3.00 MiB there" in capsys.readouterr().out


def test_places_on_one_disk_share_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 << 30, 90 << 30, 10 << 30))
    monkeypatch.setattr(disk, "_device", lambda path: 1)
    needs = {disk.HUB: 6 << 30, disk.TEMPORARY: 6 << 30}
    assert len([item for item in disk.check(tmp_path, needs, "python") if item.level == ERROR]) == 2
    assert not [item for item in disk.check(tmp_path, {disk.HUB: 6 << 30}, "python") if item.level == ERROR]


# --- Python ----------------------------------------------------------------------------------------------------------


def pip_that_says(folder: Path, text: str) -> None:
    script = folder / "pip"
    script.write_text(f"#!/bin/sh\necho '{text}'\n")
    script.chmod(0o755)


def test_another_interpreters_pip_is_named_first(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip_that_says(healthy, "pip 24.0 from /usr/lib/python3/dist-packages/pip (python 3.9)")
    monkeypatch.setenv("PATH", f"{healthy}{os.pathsep}{os.environ['PATH']}")
    line, mend = first(capsys)
    assert "installs for Python 3.9 into /usr/lib/python3/dist-packages, and not into" in line
    assert mend == f"mend it: {sys.executable} -m pip install PACKAGE"


def test_full_disk_foreign_pip_and_missing_binary_stand_first_together(
    healthy: Path, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's start: the command in a process of its own, with a copy of bitsandbytes that lacks its binary."""
    copy = healthy / "copy" / "bitsandbytes"
    copy.mkdir(parents=True)
    (copy / "__init__.py").touch()
    # None is a build of torch that there is: whichever is installed here, its own is missing.
    for build in ("918", "924", "926", "928", "930"):
        (copy / f"libbitsandbytes_cuda{build}.so").touch()
    pip_that_says(healthy, "pip 24.0 from /usr/lib/python3/dist-packages/pip (python 3.9)")
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(tmpfs),
        "PATH": f"{healthy}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(copy.parent),
    }
    command = [sys.executable, "-m", "pytest_llmload.cli", "doctor"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1, ended.stderr
    lines = ended.stdout.splitlines()
    told = [line.split(":")[0] for line in lines[:6:2]]
    assert told == ["ERROR    disk", "ERROR    pip", "ERROR    bitsandbytes"]
    assert all(line.startswith("         mend it: ") for line in lines[1:6:2])
    assert "cuda926.so, libbitsandbytes_cuda928.so and 1 more" in lines[4]
    assert not [line for line in lines[6:-1] if line.startswith("ERROR")]
    assert lines[-1].startswith("3 errors, ")


def test_what_mends_it_is_an_installer_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert python.installs("torch") == f"{sys.executable} -m ensurepip && {sys.executable} -m pip install torch"
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/uv")
    assert python.installs("torch") == f"uv pip install --python {sys.executable} torch"


@pytest.mark.parametrize("text", ["", "pyenv: pip: command not found", "pip from nowhere"])
def test_a_pip_that_does_not_say_is_an_error(healthy: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    pip_that_says(healthy, text)
    monkeypatch.setenv("PATH", str(healthy))
    (found,) = errors(python.pip())
    assert found.level == ERROR
    assert "does not say" in found.message


def test_no_pip_user_installs_and_sudo_are_told(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_USER", "1")
    assert [found.command for found in errors(python.pip())] == ["unset PIP_USER"]
    monkeypatch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
    assert "--user" in errors(python.pip())[0].message
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no pip" in errors(python.pip())[0].message
    monkeypatch.setenv("SUDO_USER", "jo")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "sudo of jo" in errors(python.interpreter())[0].message


def test_a_file_that_shadows_a_library_is_named(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (healthy / "transformers.py").write_text("")
    line, mend = first(capsys)
    assert "transformers.py is imported instead of the library transformers" in line
    assert "my_transformers.py" in mend


def test_versions_that_contradict_and_double_installations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(version: str) -> None:
        folder = tmp_path / f"tokenizers-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tokenizers\nVersion: {version}\n")

    installed("0.1.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = [*python.conflicts(), *python.shadowed(tmp_path)]
    texts = [item.message for item in found if item.level == ERROR]
    assert any("needs tokenizers" in text and "0.1.0 is installed" in text for text in texts)
    assert any("tokenizers is installed more than once" in text for text in texts)
    assert sysconfig.get_path("purelib") in " ".join(texts)


# --- GPUs ------------------------------------------------------------------------------------------------------------


def machine(monkeypatch: pytest.MonkeyPatch, build: str, gpus: tuple[Gpu, ...], newest: tuple[int, int] | None) -> None:
    monkeypatch.setattr(hardware, "torch_build", lambda: build)
    monkeypatch.setattr(hardware, "visible_gpus", lambda: (gpus, "550.54" if gpus else ""))
    monkeypatch.setattr(gpu, "driver_cuda", lambda: newest)


@pytest.mark.parametrize(
    ("build", "gpus", "newest", "level", "says", "mends"),
    [
        ("cuda 13.0", (H100,), (12, 4), ERROR, "runs CUDA 12.4 at most", "cu124"),
        ("cpu", (H100,), (12, 8), ERROR, "is a CPU build", "cu128"),
        ("cpu", (H100,), (12, 5), ERROR, "is a CPU build", "cu124"),
        ("missing", (), None, ERROR, "is not installed", "pip install torch"),
        ("cuda 12.8", (), None, WARNING, "no GPU is visible", "nvidia-smi"),
        ("cuda 12.8", (H100,), (12, 4), FINE, "79.19 GiB", ""),
        ("cpu", (), None, FINE, "no GPU", ""),
    ],
)
def test_torchs_build_is_held_against_the_driver(
    monkeypatch: pytest.MonkeyPatch,
    build: str,
    gpus: tuple[Gpu, ...],
    newest: tuple[int, int] | None,
    level: str,
    says: str,
    mends: str,
) -> None:
    machine(monkeypatch, build, gpus, newest)
    (found,) = gpu.torch_build()
    assert found.level == level
    assert says in found.message
    assert mends in found.command


def test_a_missing_binary_of_bitsandbytes_is_named_first(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = healthy / "bitsandbytes"
    package.mkdir()
    (package / "libbitsandbytes_cuda124.so").write_text("")
    spec = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(gpu, "find_spec", lambda name: spec)
    monkeypatch.setattr(hardware, "torch_build", lambda: "cpu")
    line, mend = first(capsys)
    assert f"{package}/libbitsandbytes_cpu.so is missing" in line
    assert "it has libbitsandbytes_cuda124.so" in line
    assert f"install --force-reinstall --no-deps bitsandbytes=={version('bitsandbytes')}" in mend
    monkeypatch.setattr(hardware, "torch_build", lambda: "cuda 13.0")
    (found,) = gpu.binaries()
    assert "libbitsandbytes_cuda130.so is missing" in found.message
    assert "BNB_CUDA_VERSION=124" in found.command


def test_who_holds_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "cuda 13.0", (H100,), (13, 0))
    monkeypatch.setattr(hardware, "holders", lambda gpu: ["pid 4711 (python) with 12.00 GiB"])
    (found,) = gpu.holders()
    assert "pid 4711 (python)" in found.message
    assert "-p 4711" in found.command

    def refuses() -> Any:
        raise MachineError("the driver refuses")

    monkeypatch.setattr(hardware, "visible_gpus", refuses)
    assert [found.level for found in (*gpu.holders(), *gpu.torch_build())] == [ERROR, ERROR]


# --- limits ----------------------------------------------------------------------------------------------------------


def test_shared_memory_and_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    (found,) = limits.shared_memory()
    assert (found.level, "shm-size" in found.command) == (WARNING, True)
    monkeypatch.setattr(limits, "SHARED", tmp_path / "none")
    assert [found.level for found in limits.shared_memory()] == [ERROR]
    values = {resource.RLIMIT_NOFILE: (256, 4096), resource.RLIMIT_AS: (4 << 30, -1), resource.RLIMIT_DATA: (-1, -1)}
    monkeypatch.setattr(resource, "getrlimit", values.__getitem__)
    found_limits = errors(limits.ulimits())
    assert [(found.level, found.command) for found in found_limits] == [
        (WARNING, "ulimit -n 4096"),
        (ERROR, "ulimit -v unlimited"),
    ]


def test_errors_stand_first() -> None:
    found = [Finding("a", FINE, ""), Finding("b", ERROR, ""), Finding("c", WARNING, ""), Finding("d", ERROR, "")]
    assert [item.check for item in examination.ordered(found)] == ["b", "d", "c", "a"]
