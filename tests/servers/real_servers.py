"""Starting and stopping real servers of a small model on loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import served_models

from pytest_llmload.core.job import Checkpoint, Device, Job
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import LoadSpec, Workload
from pytest_llmload.process.serving import finding, served_model
from pytest_llmload.process.serving.answers import Answer
from pytest_llmload.process.serving.http import Endpoint, Unreachable
from pytest_llmload.process.serving.prompts import Prompts
from pytest_llmload.process.serving.served_model import ServedModel
from pytest_llmload.process.serving.server_process import HOST, ServerProcess, free_port

HERE = Path(__file__).parent
WORKLOAD = Workload(1, 32, 16)
#: Of the LiteLLM proxy, which does not start without one.
MASTER_KEY = "sk-0123456789abcdef0123456789abcdef"
#: Seconds for a server to become healthy on a busy machine.
_PATIENCE = 600
KINDS = ("llama-server", "litellm", "transformers-5", "transformers-4", "llama-cpp-python", "vllm")
#: Options of the second server of a kind. In fp32 each token takes twice as much of vLLM's cache, which is 1 GiB.
SMALLER: dict[str, dict[str, Any]] = {
    "llama-server": {"context": 256, "slots": 1, "key": "opensesame"},
    "llama-cpp-python": {"context": 256, "key": "opensesame"},
    "litellm": {"context": 256, "slots": 1},
    "vllm": {"key": "opensesame", "arguments": ["--dtype", "float32"]},
}
#: Small matrices gain nothing from threads, and nothing is to be fetched.
ENVIRONMENT = (
    "OMP_NUM_THREADS=1",
    "HF_HUB_OFFLINE=1",
    "VLLM_CPU_KVCACHE_SPACE=1",
    "VLLM_NO_USAGE_STATS=1",
    "LITELLM_LOCAL_MODEL_COST_MAP=True",
)


@dataclass
class Real:
    """A server that runs."""

    name: str
    process: ServerProcess
    url: str
    #: The id that it has the model under.
    model: str
    #: Its key, where it needs one.
    key: str = ""
    #: Servers behind it.
    behind: list[Real] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """The process whose end is the end of the model."""
        return self.behind[0].pid if self.behind else self.process.pid

    def stop(self) -> None:
        self.process.stop()
        for server in self.behind:
            server.stop()


@contextlib.contextmanager
def client(
    server: Real, servers: Servers, folder: Path, *, model_id: str = "", path: str = "/v1", **fields: Any
) -> Iterator[ServedModel]:
    """The client of a running server, in this process; ``path`` ends the address that it is given."""
    job = dataclasses.replace(_job(servers, fields), endpoint=f"{model_id or server.model}={server.url}{path}")
    with pytest.MonkeyPatch.context() as patch, served_models.client(job, folder) as served:
        patch.setattr(served_model, "Prompts", _unsalted)
        yield served


def _unsalted(length: int, tokenizer: Any, *, salted: bool) -> Prompts:
    """The same prompts in every run: after some, a random model writes bytes that are no text for thousands of tokens.

    llama-cpp-python keeps them back, and takes longer for each further one, so that no third piece comes.
    """
    return Prompts(length, tokenizer, salted=False)


@contextlib.contextmanager
def owner(name: str, servers: Servers, folder: Path, **fields: Any) -> Iterator[ServedModel]:
    """The owner and client of a server that its load starts, in this process."""
    command = json.dumps(servers.command(name, "{port}"))
    options = (("command", command), ("model_id", json.dumps(servers.id(name))))
    with served_models.client(_job(servers, {"options": options, **fields}), folder) as served:
        yield served


def _job(servers: Servers, fields: dict[str, Any]) -> Job:
    path = str(servers.checkpoint)
    spec = LoadSpec(model=path, name="tiny-llama", strategy="served", **{"workload": WORKLOAD, **fields})
    return Job(spec=spec, device=Device("cpu", "cpu-x86_64"), checkpoint=Checkpoint(path, "", ""), timeout=240.0)


def said(result: LoadResult) -> str:
    """Return the messages and the notes of a load."""
    return "\n".join([*(problem.message for problem in result.problems), *result.notes])


def at_the_third_piece(patch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    """Have something done in the middle of an answer."""
    add = Answer.add

    def adding(answer: Answer, moment: float, piece: str) -> None:
        add(answer, moment, piece)
        if len(answer.pieces) == 3:
            do()

    patch.setattr(Answer, "add", adding)


@dataclass
class Servers:
    """Knows how each server is started."""

    #: Of logs, configurations and files for llama.cpp.
    folder: Path
    #: The model.
    checkpoint: Path
    _number: int = 0

    def python(self, environment: str) -> str:
        """Return the interpreter of an environment."""
        path = Path(os.environ["LLMLOAD_SERVERS"]) / environment / "bin" / "python"
        assert path.exists(), f"{path} is missing: make test-servers builds it"
        return str(path)

    def gguf(self) -> Path:
        """Return the model as a file of llama.cpp's."""
        file = self.folder / "tiny-llama.gguf"
        if not file.exists():
            maker = [self.python("llama-server"), str(HERE / "gguf_model.py"), str(self.checkpoint), str(file)]
            subprocess.run(maker, check=True)
        return file

    def command(
        self,
        name: str,
        port: str,
        *,
        context: int = 4096,
        slots: int = 8,
        key: str = "",
        prefix: str = "",
        arguments: Sequence[str] = (),
    ) -> list[str]:
        """Return the command line that starts a server of the model; ``port`` may be ``{port}``.

        ``arguments`` are further ones, for servers that take the usual ones.
        """
        model = str(self.checkpoint)
        if name == "llama-server":
            own = [str(HERE / "llama_server.py"), str(self.gguf()), port, str(context * slots), str(slots), key, prefix]
            return ["env", *ENVIRONMENT, self.python(name), *own]
        if name == "llama-cpp-python":
            own = ["llama_cpp.server", "--model", str(self.gguf()), "--model_alias", "tiny-llama", "--n_threads", "1"]
            own += ["--host", HOST, "--port", port, "--n_ctx", str(context)]
            own += [*(["--api_key", key] if key else []), *arguments]
            return ["env", *ENVIRONMENT, self.python("llama-cpp"), "-m", *own]
        if name == "vllm":
            own = ["vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "tiny-llama"]
            # All that a chat answers is reasoning to this parser, until an end of it that no model of ours writes.
            own += ["--host", HOST, "--port", port, "--max-model-len", str(context), "--enforce-eager"]
            own += ["--reasoning-parser", "glm45"]
            own += [*(["--api-key", key] if key else []), *arguments]
            return ["env", *ENVIRONMENT, self.python(name), "-m", *own]
        device = ["--host", HOST, "--port", port, "--device", "cpu", *arguments]
        if name == "transformers-5":
            program = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
            return ["env", *ENVIRONMENT, self.python(name), "-c", program, "serve", model, *device]
        assert name == "transformers-4"
        program = "import sys; from transformers.commands.transformers_cli import main; sys.exit(main())"
        return ["env", *ENVIRONMENT, self.python(name), "-c", program, "serve", "--force_model", model, *device]

    def start(self, name: str, **options: Any) -> Real:
        """Start a server and wait until it is healthy; ``options`` are those of :meth:`command`."""
        port = free_port()
        if name == "litellm":
            tls = options.pop("tls", None)
            return self._proxy(port, self.start("llama-server", **options), tls)
        command = self.command(name, str(port), **options)
        url = f"http://{HOST}:{port}{options.get('prefix', '')}"
        return self.started(name, command, url, self.id(name), options.get("key", ""))

    def id(self, name: str) -> str:
        """Return the id that a server has the model under: the path that it was given, if it was given no name."""
        if name.startswith("transformers"):
            return str(self.checkpoint)
        return str(self.gguf()) if name == "llama-server" else "tiny-llama"

    def proxy_config(self, behind: Real, name: str = "tiny-llama") -> Path:
        """Return a configuration of LiteLLM that puts it in front of a server; ``name`` is what it calls the model."""
        config = self.folder / f"litellm-{behind.pid}-{name}.yaml"
        config.write_text(
            f"model_list:\n  - model_name: {name}\n    litellm_params:\n"
            f"      {{model: openai/{behind.model}, api_base: '{behind.url}/v1', api_key: none, max_retries: 0}}\n"
            f"general_settings: {{master_key: {MASTER_KEY}}}\n"
        )
        return config

    def _proxy(self, port: int, behind: Real, tls: tuple[Path, Path] | None) -> Real:
        program = "import sys; from litellm import run_server; sys.exit(run_server())"
        own = ["-c", program, "--config", str(self.proxy_config(behind)), "--host", HOST, "--port", str(port)]
        if tls is not None:
            own += ["--ssl_certfile_path", str(tls[0]), "--ssl_keyfile_path", str(tls[1])]
        command = ["env", *ENVIRONMENT, self.python("litellm"), *own]
        url = f"http{'s' if tls is not None else ''}://{HOST}:{port}"
        real = self.started("litellm", command, url, "tiny-llama", MASTER_KEY)
        real.behind.append(behind)
        return real

    def started(self, name: str, command: Sequence[str], url: str, model: str, key: str) -> Real:
        """Start a command line, and wait until its server is healthy."""
        self._number += 1
        process = ServerProcess(command, self.folder / f"{self._number}-{name}.log")
        endpoint = Endpoint(url, key)

        def complaint() -> str:
            try:
                return finding.look(endpoint, "", ours=False, key=key)[1]
            except Unreachable as error:
                return str(error)

        deadline = endpoint.deadline = time.monotonic() + _PATIENCE
        process.wait_until(complaint, deadline, endpoint.is_open)
        return Real(name, process, url, model, key)


class Shared:
    """Servers that tests share, one of a kind, each started when it is first asked for."""

    def __init__(self, servers: Servers, options: Mapping[str, dict[str, Any]]) -> None:
        self._servers, self._options = servers, options
        self._started: dict[str, Real] = {}

    def __call__(self, name: str) -> Real:
        if name not in self._started:
            self._started[name] = self._servers.start(name, **self._options.get(name, {}))
        return self._started[name]

    def take(self, name: str) -> Real:
        """Return a server to a test that ends it; a later test gets another."""
        server = self(name)
        del self._started[name]
        return server

    def stop(self) -> None:
        for server in reversed(self._started.values()):
            server.stop()
