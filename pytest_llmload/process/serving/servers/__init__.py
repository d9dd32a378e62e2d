"""Model servers: what differs between them is one file each, chosen by what the endpoint says of itself."""

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

#: Asked in turn whether they recognise an endpoint, first those that look at what is cheap to answer (vLLM takes
#: seconds for its ``/openapi.json``); the last one takes what no other does.
KINDS: tuple[type[ServerKind], ...] = (Tgi, Vllm, LlamaServer, LiteLlm, LlamaCppPython, TransformersServe, OpenAi)


def identify(endpoint: Endpoint, says: SelfDescription, api: str = "") -> ServerKind:
    """Return the server that answers at an endpoint.

    ``api`` is ``openai``, ``chat``, ``completions`` or ``tgi`` where a user names the protocol, else empty.
    """
    kinds = [kind for kind in KINDS if not api or (kind is Tgi) == (api == "tgi")]
    kind = next((kind for kind in kinds if kind.recognises(says)), kinds[-1])
    return kind(endpoint, says, api)
