"""Model servers: one file for each kind, chosen by what the endpoint reports about itself."""

from __future__ import annotations

from pytest_llmload.process.serving.http import Endpoint
from pytest_llmload.process.serving.servers.base import SelfDescription, ServerKind
from pytest_llmload.process.serving.servers.litellm import LiteLlm
from pytest_llmload.process.serving.servers.llama_cpp_python import LlamaCppPython
from pytest_llmload.process.serving.servers.llama_server import LlamaServer
from pytest_llmload.process.serving.servers.openai import OpenAi
from pytest_llmload.process.serving.servers.tgi import Tgi
from pytest_llmload.process.serving.servers.transformers_serve import TransformersServe
from pytest_llmload.process.serving.servers.vllm import Vllm

#: The kinds in the order in which they are tried. Those that need only cheap answers come first (vLLM takes seconds for
#: its ``/openapi.json``); the last one accepts every endpoint.
KINDS: tuple[type[ServerKind], ...] = (Tgi, Vllm, LlamaServer, LiteLlm, LlamaCppPython, TransformersServe, OpenAi)


def identify(endpoint: Endpoint, says: SelfDescription, api: str = "") -> ServerKind:
    """Return the server that answers at an endpoint.

    ``api`` is ``openai``, ``chat``, ``completions`` or ``tgi`` if the user names the protocol, else empty.
    """
    kinds = [kind for kind in KINDS if not api or (kind is Tgi) == (api == "tgi")]
    kind = next((kind for kind in kinds if kind.recognises(says)), kinds[-1])
    return kind(endpoint, says, api)
