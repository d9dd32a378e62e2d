"""Starting and stopping real servers of a small model on loopback."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_llmload.process.serving import finding
from pytest_llmload.process.serving.http import Endpoint, Unreachable
from pytest_llmload.process.serving.server_process import HOST, ServerProcess, free_port
from pytest_llmload.worker.checkpoints.resolve import resolve

HERE = Path(__file__).parent
#: Of the LiteLLM proxy, which does not start without one.
MASTER_KEY = "sk-0123456789abcdef0123456789abcdef"
#: Seconds for a server to become healthy on a busy machine.
_PATIENCE = 300
KINDS = ("llama-server", "litellm", "transformers-5", "transformers-4", "llama-cpp-python", "vllm")
#: Small matrices gain nothing from threads, and nothing is to be fetched.
_ENVIRONMENT = ("OMP_NUM_THREADS=1", "HF_HUB_OFFLINE=1", "VLLM_CPU_KVCACHE_SPACE=1", "VLLM_NO_USAGE_STATS=1")


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


class Servers:
    """Knows how each server is started."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self._folder = folder
        self._environments = Path(os.environ["LLMLOAD_SERVERS"])
        self.checkpoint = Path(resolve("random:tiny-llama", cache).path)
        self._number = 0

    def python(self, environment: str) -> str:
        """Return the interpreter of an environment."""
        path = self._environments / environment / "bin" / "python"
        assert path.exists(), f"{path} is missing: make test-servers builds it"
        return str(path)

    def gguf(self) -> Path:
        """Return the model as a file of llama.cpp's."""
        file = self._folder / "tiny-llama.gguf"
        if not file.exists():
            maker = [self.python("llama-server"), str(HERE / "gguf_model.py"), str(self.checkpoint), str(file)]
            subprocess.run(maker, check=True)
        return file

    def command(
        self, name: str, port: str, *, context: int = 4096, slots: int = 8, key: str = "", prefix: str = ""
    ) -> list[str]:
        """Return the command line that starts a server of the model; ``port`` may be ``{port}``."""
        model = str(self.checkpoint)
        if name == "llama-server":
            own = [str(HERE / "llama_server.py"), str(self.gguf()), port, str(context * slots), str(slots), key, prefix]
            return ["env", *_ENVIRONMENT, self.python(name), *own]
        if name == "llama-cpp-python":
            own = ["llama_cpp.server", "--model", str(self.gguf()), "--model_alias", "tiny-llama", "--n_threads", "1"]
            own += ["--host", HOST, "--port", port, "--n_ctx", str(context)]
            return ["env", *_ENVIRONMENT, self.python("llama-cpp"), "-m", *own]
        if name == "vllm":
            own = ["vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "tiny-llama"]
            own += ["--host", HOST, "--port", port, "--max-model-len", str(context), "--enforce-eager"]
            own += ["--api-key", key] if key else []
            return ["env", *_ENVIRONMENT, self.python(name), "-m", *own]
        device = ["--host", HOST, "--port", port, "--device", "cpu"]
        if name == "transformers-5":
            program = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
            return ["env", *_ENVIRONMENT, self.python(name), "-c", program, "serve", model, *device]
        assert name == "transformers-4"
        program = "import sys; from transformers.commands.transformers_cli import main; sys.exit(main())"
        return ["env", *_ENVIRONMENT, self.python(name), "-c", program, "serve", "--force_model", model, *device]

    def start(self, name: str, **options: Any) -> Real:
        """Start a server and wait until it is healthy; ``options`` are those of :meth:`command`."""
        port = free_port()
        if name == "litellm":
            tls = options.pop("tls", None)
            return self._proxy(port, self.start("llama-server", **options), tls)
        command = self.command(name, str(port), **options)
        url = f"http://{HOST}:{port}{options.get('prefix', '')}"
        return self._started(name, command, url, self._id(name), options.get("key", ""))

    def _id(self, name: str) -> str:
        return str(self.checkpoint) if name.startswith("transformers") else self.alias(name)

    def alias(self, name: str) -> str:
        """Return the id of a server that can be given one, or lists the path of its file."""
        return str(self.gguf()) if name == "llama-server" else "tiny-llama"

    def _proxy(self, port: int, behind: Real, tls: tuple[Path, Path] | None) -> Real:
        config = self._folder / f"litellm-{port}.yaml"
        config.write_text(
            "model_list:\n  - model_name: tiny-llama\n    litellm_params:\n"
            f"      {{model: openai/{behind.model}, api_base: '{behind.url}/v1', api_key: none, max_retries: 0}}\n"
            f"general_settings: {{master_key: {MASTER_KEY}}}\n"
        )
        program = "import sys; from litellm import run_server; sys.exit(run_server())"
        own = ["-c", program, "--config", str(config), "--host", HOST, "--port", str(port)]
        if tls is not None:
            own += ["--ssl_certfile_path", str(tls[0]), "--ssl_keyfile_path", str(tls[1])]
        command = ["env", *_ENVIRONMENT, "LITELLM_LOCAL_MODEL_COST_MAP=True", self.python("litellm"), *own]
        url = f"http{'s' if tls is not None else ''}://{HOST}:{port}"
        real = self._started("litellm", command, url, "tiny-llama", MASTER_KEY)
        real.behind.append(behind)
        return real

    def _started(self, name: str, command: list[str], url: str, model: str, key: str) -> Real:
        self._number += 1
        process = ServerProcess(command, self._folder / f"{self._number}-{name}.log")
        endpoint = Endpoint(url, key)

        def complaint() -> str:
            try:
                return finding.look(endpoint, "", ours=False, key=key)[1]
            except Unreachable as error:
                return str(error)

        deadline = endpoint.deadline = time.monotonic() + _PATIENCE
        process.wait_until(complaint, deadline, endpoint.is_open)
        return Real(name, process, url, model, key)
