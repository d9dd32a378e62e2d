"""A process that has imported torch and transformers, from which runs of Python are forked: of pytest, most of all.

Each run in a user's project would import them for seconds, and most tests are not about that. A forked run has the
command line, environment, folder and standard files that it would have been started with, and ends with an exit status.
Before pytest starts, it forks the processes that become the run's warm servers and xdist's workers: nothing that the
user's project imports is in there. A run or a server whose environment decides how Python, torch or transformers start
is started as usual; the hub's client, which reads its environment when it is imported, reads it again.

One template serves the whole test session: xdist's workers that run these tests are forked from it too. It forks a
process for each of its callers, which forks their runs one by one.

What pytest, the plugin and other installed plugins import is imported too: the others as pytest does it, which rewrites
their assertions. The template writes the bytecode of the package where it is not there; runs write none: a test that
writes a module twice within a second, in the same length, would else get the first again.

The template's memory is moved to huge pages where the kernel is able to: a fork copies one entry for each page.
"""

from __future__ import annotations

import atexit
import compileall
import contextlib
import ctypes
import importlib
import io
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import IO, Any, NoReturn

from _pytest.assertion import install_importhook
from _pytest.config import default_plugins, get_config
from huggingface_hub import constants as hub_settings

import pytest_llmload
from pytest_llmload.core.libraries import is_installed
from pytest_llmload.system.garbage import collected_rarely, freeze
from pytest_llmload.system.process import die_with_parent

#: A change of one of these has to be seen by an interpreter or a library that starts.
STARTS = (
    *("PYTHON", "TRANSFORMERS", "TORCH", "MALLOC", "LD_", "OMP_", "MKL_", "OPENBLAS", "CUDA", "BNB", "LC_"),
    # Before 1.0, the hub's client has copies of its settings in many modules.
    *(("HF_",) if version("huggingface_hub").startswith("0.") else ()),
)
#: These make no difference. The first is added when forked. The second is set by torch: in a process of tests whose
#: loads import its compiler, every later run would start cold.
_ALIKE = ("PYTHONPATH", "TORCHINDUCTOR_CACHE_DIR")
#: The variable with the template's address, in the environment of the workers that were forked from it.
ADDRESS = "LLMLOAD_TEST_TEMPLATE"
#: The call that starts a warm server, as the product writes it, and the program of xdist's workers, as execnet does.
_SERVER = "from pytest_llmload.process.server import main"
_WORKER = "import sys;exec(eval(sys.stdin.readline()))"
#: Processes that are forked for a run, or for one of its workers, before pytest starts. Most runs need two, for their
#: loads and for the model's files, and a third for a load with an environment of its own. Further ones start cold,
#: unless the test asks for more.
SERVERS = 3
_WORKERS = 4
_MESSAGE = 1 << 20
_HUGE_PAGE = 1 << 21
_MADV_COLLAPSE = 25
#: The parts of the package that pytest imports.
_IN_PYTEST = ("core", "system", "baselines", "reports", "quantisation", "strategies", "probes", "host", "integrations")
#: What loads with a quantiser or an adapter import, as far as it is installed.
_OF_LOADS = ("bitsandbytes", "peft", "peft.utils.transformers_weight_conversion", "transformers.integrations.peft")
#: What plugins of pytest import, as far as it is installed.
_OF_PLUGINS = (
    "trio",
    "trio.from_thread",
    "asyncio",
    "jinja2",
    "tarfile",
    "zipfile",
    "pdb",
    "execnet",
    "allure_commons",
)


class StartsOtherwise(Exception):
    """The environment of a run decides how Python, torch or transformers start: the run has to be started."""


class TemplateProcess:
    """The template as the process that has started it has it: it ends when that closes it, or ends."""

    def __init__(self) -> None:
        self.address = f"llmload-test-{os.getpid()}"
        self._alive, theirs = socket.socketpair()
        with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as calls:
            calls.bind(f"\0{self.address}")
            calls.listen()
            files = [theirs.fileno(), calls.fileno()]
            command = [sys.executable, __file__, *map(str, files)]
            self._process = subprocess.Popen(command, pass_fds=files, stdin=subprocess.DEVNULL)

    def close(self) -> None:
        """End the template, and all that was forked from it."""
        self._alive.close()
        self._process.wait()


class Template:
    """The template as its callers have it: forks one run at a time."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(f"\0{address}")

    def popen(
        self,
        arguments: list[str],
        *,
        cwd: Path,
        environment: dict[str, str],
        output: tuple[int, int],
        servers: int = SERVERS,
    ) -> Run:
        """Fork ``python -m pytest`` with these arguments; ``output`` holds the files of stdout and stderr.

        Raises StartsOtherwise if the run's environment is not the template's in what Python or the libraries read.
        """
        request = {
            "program": "python",
            "arguments": ["-m", "pytest", *arguments],
            "cwd": str(cwd),
            "environment": environment,
            "servers": servers,
        }
        with Path(os.devnull).open("rb") as stdin:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [stdin.fileno(), *output])
        pid = _answer(self._socket, "pid")
        if not pid:
            raise StartsOtherwise
        return Run(self._socket, pid)

    def close(self) -> None:
        """Have no further run forked."""
        self._socket.close()


def write_python(address: str, path: Path) -> Path:
    """Write a ``python`` whose code, modules of ours, pytest and its workers are forked from the template."""
    program = Path(__file__).with_name("forked_python.py")
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {program} {address} "$@"\n')
    path.chmod(0o755)
    return path


class Run:
    """A run that was forked, with the part of ``subprocess.Popen`` that pytester uses."""

    stdin = None
    returncode: int | None = None

    def __init__(self, template: socket.socket, pid: int) -> None:
        self._template = template
        self.pid = pid

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status; raise TimeoutExpired after so many seconds."""
        if self.returncode is None:
            self._template.settimeout(timeout)
            try:
                self.returncode = _answer(self._template, "status")
            except TimeoutError:
                raise subprocess.TimeoutExpired("pytest", timeout or 0.0) from None
            finally:
                self._template.settimeout(None)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send the run a signal, unless it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the run."""
        self.send_signal(signal.SIGKILL)


def _answer(template: socket.socket, name: str) -> int:
    """Return the number that the template says next; raise EOFError if it is gone."""
    said = template.recv(_MESSAGE)
    if not said:
        raise EOFError("the process that runs are forked from is gone")
    return int(json.loads(said)[name])


def _start_alike(environment: Mapping[str, str], other: Mapping[str, str]) -> bool:
    names = {*environment, *other} - {*_ALIKE}
    return not any(name.startswith(STARTS) and environment.get(name) != other.get(name) for name in names)


class _Stem:
    """A process that becomes a program of the run that forked it, with the part of ``Popen`` that its users need."""

    returncode: int | None = None
    stdin: IO[bytes] | None = None
    stdout: IO[bytes] | None = None

    def __init__(self, becomes: Callable[[socket.socket], None]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = _fork(partial(becomes, theirs), [self._socket])
        theirs.close()

    def start_server(self, arguments: list[str], keywords: dict[str, Any]) -> None:
        """Have it become the server that ``subprocess.Popen`` would start with these arguments."""
        self._start(
            {"arguments": arguments[2:], "environment": keywords["env"]},
            [*keywords["pass_fds"], keywords["stdout"].fileno()],
        )

    def start_worker(self) -> None:
        """Have it become a worker of xdist, which is talked to by its standard input and output."""
        (theirs_in, ours_in), (ours_out, theirs_out) = os.pipe(), os.pipe()
        self._start({"cwd": str(Path.cwd()), "environment": dict(os.environ)}, [theirs_in, theirs_out])
        os.close(theirs_in)
        os.close(theirs_out)
        self.stdin, self.stdout = os.fdopen(ours_in, "wb"), os.fdopen(ours_out, "rb")

    def _start(self, request: dict[str, Any], files: list[int]) -> None:
        socket.send_fds(self._socket, [json.dumps(request).encode()], files)
        self._socket.close()

    def poll(self) -> int | None:
        """Return the exit status, or None where it has not ended."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status; raise TimeoutExpired after so many seconds."""
        if self.returncode is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                if not select.select([pidfd], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired("forked process", timeout or 0.0)
            finally:
                os.close(pidfd)
        status = self.poll()
        assert status is not None
        return status

    def kill(self) -> None:
        """Kill the process."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _serve(run: socket.socket) -> None:
    """Become the warm server that the run asks for; end where the run ends without one."""
    said, files, *_ = socket.recv_fds(run, _MESSAGE, 2)
    if not said:
        return
    channel, log = files
    run.close()
    request = json.loads(said)
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, min(channel, log))
    _enter(request["environment"])
    program, root, _, parent = request["arguments"]
    sys.argv = ["-c", root, str(channel), parent]
    exec(program, {"__name__": "__main__"})


def _work(run: socket.socket) -> None:
    """Become the worker that the run asks for; end where the run ends without one."""
    if not run.recv(1, socket.MSG_PEEK):
        return
    # Forked before the worker has its files, whose end shows the run that a worker has died.
    servers = _stems(_serve, SERVERS)
    said, files, *_ = socket.recv_fds(run, _MESSAGE, 2)
    run.close()
    request = json.loads(said)
    _start_from(servers, [], request["environment"])
    _become_worker(request, files)


def _become_worker(request: dict[str, Any], files: list[int]) -> None:
    """Run what xdist sends, as execnet's program of a worker does; ``files`` are its stdin, stdout, stderr."""
    _open_as(files)
    os.chdir(request["cwd"])
    _enter(request["environment"])
    sys.argv = ["-c"]
    sys.path[0] = ""
    exec(_WORKER, {"__name__": "__main__"})


def _open_as(files: list[int]) -> None:
    """Make these files the standard ones, from stdin on."""
    for target, source in enumerate(files):
        os.dup2(source, target)
        os.close(source)


def _run(request: dict[str, Any], files: list[int]) -> None:
    """Run what ``python -m MODULE …`` or ``python -c CODE …`` would; ``files`` are its stdin, stdout and stderr."""
    _open_as(files)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=stream.isatty())
    os.chdir(request["cwd"])
    # A shell's background jobs ignore it, and so would all that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kind, program, *arguments = request["arguments"]
    if program == "pytest":
        in_workers = any(argument.startswith("-n") for argument in arguments)
        servers, workers = _stems(_serve, request.get("servers", SERVERS)), _stems(_work, _WORKERS if in_workers else 0)
        _start_from(servers, workers, request["environment"])
    _enter(request["environment"])
    sys.argv = [kind, *arguments]
    if kind == "-c":
        sys.path[0] = ""
        exec(program, {"__name__": "__main__"})
    else:
        sys.path[0] = request["cwd"]
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _stems(becomes: Callable[[socket.socket], None], count: int) -> list[_Stem]:
    return [_Stem(becomes) for _ in range(count)]


def _enter(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # Read from the environment where it is first asked for.
    tempfile.tempdir = None
    importlib.reload(hub_settings)
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def _start_from(servers: list[_Stem], workers: list[_Stem], environment: dict[str, str]) -> None:
    """Have ``subprocess.Popen`` take these processes for what they are for, where an exec would make no difference.

    The first server's environment is that of the run. A later one may differ from it, for a load with one of its own.
    """
    first: list[dict[str, str]] = []

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __new__(cls, args: Any, *rest: Any, **keywords: Any) -> Any:
            program = args[-1] if isinstance(args, list) else ""
            if workers and program == _WORKER and _start_alike(os.environ, environment):
                worker = workers.pop()
                worker.start_worker()
                return worker
            program = args[2] if isinstance(args, list) and len(args) > 2 else ""
            if servers and _SERVER in str(program):
                first.append(keywords["env"])
                if _start_alike(keywords["env"], first[0]):
                    server = servers.pop()
                    server.start_server(args, keywords)
                    return server
            return super().__new__(cls)

    subprocess.Popen = Popen  # type: ignore[misc]


def _as_main(main: Callable[[], None]) -> NoReturn:
    """End the process as an interpreter does whose program this is."""
    status = 1
    try:
        main()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _import_pytest() -> None:
    """Import what runs of pytest import, but for what pytest rewrites."""
    for name in default_plugins:
        importlib.import_module(f"_pytest.{name}")
    for name in filter(is_installed, _OF_PLUGINS):
        importlib.import_module(name)
    for module in pkgutil.walk_packages(pytest_llmload.__path__, "pytest_llmload."):
        part = module.name.split(".")[1]
        if part in _IN_PYTEST:
            # An integration imports the plugin that it is for, which may not be here.
            with suppress(*([ModuleNotFoundError] if part == "integrations" else [])):
                importlib.import_module(module.name)
    # pytest would warn of a package that it cannot rewrite any more.
    pytest_llmload.__doc__ = f"{pytest_llmload.__doc__} PYTEST_DONT_REWRITE"


def _import_plugins() -> None:
    """Import other packages' plugins as pytest does: it would warn of a package that was not rewritten."""
    plugins = [entry for entry in entry_points(group="pytest11") if entry.module.split(".")[0] != "pytest_llmload"]
    config = get_config()
    # Read by the hook; before pytest 9, a config that has parsed nothing does not know them.
    config._inicache |= {"python_files": ["test_*.py"], "enable_assertion_pass_hook": False}
    hook = install_importhook(config)
    hook.mark_rewrite(*{entry.module.split(".")[0] for entry in plugins})
    for entry in plugins:
        entry.load()
    sys.meta_path.remove(hook)


def _leave_libraries_as_they_are() -> None:
    """Let no run take back at its end what libraries have set up here, as torch does with each operator of its own.

    It takes 40 ms, most of it to copy the pages that it writes. What a run sets up itself is taken back.
    """
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False


def _use_huge_pages() -> None:
    """Move this process's memory to huge pages; a kernel that is not able to (before Linux 6.1) leaves it."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, _, _, inode, *_ = line.split()
        if access == "rw-p" and inode == "0":
            begin, end = (int(address, 16) for address in addresses.split("-"))
            for page in range(-(-begin // _HUGE_PAGE) * _HUGE_PAGE, end - _HUGE_PAGE + 1, _HUGE_PAGE):
                madvise(page, _HUGE_PAGE, _MADV_COLLAPSE)


def _main(*sockets: int) -> None:
    alive, calls = (socket.socket(fileno=fd) for fd in sockets)
    for fd in sockets:
        os.set_inheritable(fd, False)
    from pytest_llmload.host.loads.preloaded_modules import BASE, architecture
    from pytest_llmload.process import server_imports

    sys.dont_write_bytecode = False
    with collected_rarely():
        _import_plugins()
    # As a server's for loads on a CPU.
    server_imports.import_all((*BASE, *architecture("llama"), *_OF_LOADS), {"count": 0, "capability": (0, 0)})
    compileall.compile_dir(Path(pytest_llmload.__file__).parent, quiet=1)
    _import_pytest()
    _leave_libraries_as_they_are()
    sys.dont_write_bytecode = True
    freeze()
    _use_huge_pages()
    while alive not in select.select([alive, calls], [], [])[0]:
        call, _ = calls.accept()
        _fork(partial(_answer_calls, call), [alive, calls])
        call.close()
        _reap()
    _reap()


def _reap() -> None:
    """Wait for the children that have ended, so that their time counts as this process's."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _answer_calls(call: socket.socket) -> None:
    """Fork the runs that a caller asks for, one by one, until it hangs up."""
    while True:
        said, files, *_ = socket.recv_fds(call, _MESSAGE, 3)
        if not said:
            return
        request = json.loads(said)
        pid = 0
        # One that would not start alike is started by the caller.
        if _start_alike(request["environment"], os.environ):
            pid = _fork(partial(_PROGRAMS[request["program"]], request, files), [call])
        for fd in files:
            os.close(fd)
        call.send(json.dumps({"pid": pid}).encode())
        if pid:
            _, status = os.waitpid(pid, 0)
            call.send(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode())


def _run_tests(request: dict[str, Any], files: list[int]) -> None:
    """Become a worker of the session itself, which keeps the bytecode of the tests that it imports."""
    sys.dont_write_bytecode = False
    _become_worker(request, files)


#: What a caller may have forked.
_PROGRAMS = {"python": _run, "worker": _run_tests}


def _fork(becomes: Callable[[], None], opened: list[socket.socket]) -> int:
    """Fork a process that ends with this one, and has none of these sockets; return its id."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        for connection in opened:
            connection.close()
        die_with_parent(parent, signal.SIGKILL)
        _as_main(becomes)
    return pid


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
