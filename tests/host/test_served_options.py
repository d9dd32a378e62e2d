"""``--llm-endpoint``, and what ``served`` cannot be combined with: one clear sentence before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_llmload.core.endpoint_address import EndpointAddress
from pytest_llmload.host.settings.settings import parse_endpoint

URL = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "http://host:99999", "http://host:0", "nowhere"],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match="this is not the address of a server: write http://HOST:PORT"):
        parse_endpoint(url)


@pytest.mark.parametrize(
    "url", ["http://user:opensesame@host", "https://host?key=opensesame", "https://host/#opensesame"]
)
def test_an_address_that_may_hold_a_secret_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="put the key into the environment variable LLM_ENDPOINT_KEY") as caught:
        parse_endpoint(url)
    assert "opensesame" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://host:8000/v1/", "https://host", "http://[::1]:80"])
def test_what_is_an_address(url: str) -> None:
    assert parse_endpoint(url) == url.rstrip("/")


@pytest.mark.parametrize(
    ("text", "url", "model_id", "api"),
    [
        ("http://host:8000/v1", "http://host:8000", "", ""),
        ("acme/chat-large=https://host/llm/v1/", "https://host/llm", "acme/chat-large", ""),
        ("/models/tiny.gguf=http://host", "http://host", "/models/tiny.gguf", ""),
        ("a=b=http://host", "http://host", "a=b", ""),
        ("http://host/v1/chat/completions", "http://host", "", "chat"),
        ("m=http://host/x/v1/completions", "http://host/x", "m", "completions"),
    ],
)
def test_an_address_names_the_id_and_the_path(text: str, url: str, model_id: str, api: str) -> None:
    assert EndpointAddress.parse(text) == EndpointAddress(url, model_id, api)


def test_both_sources_name_themselves_and_no_secret(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makeini("[pytest]\nllm_endpoint = nowhere\n")
    pytester.makepyfile("def test_a(llm): pass")
    project().stderr.fnmatch_lines(["ERROR: llm_endpoint: this is not the address of a server*"])
    result = project("--llm-endpoint=http://user:opensesame@host")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --llm-endpoint: an address with a user*"])
    assert "opensesame" not in result.stderr.str() + result.stdout.str()


def test_whom_an_endpoint_concerns(pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]) -> None:
    pytester.makepyfile(
        """
        import pytest
        def test_plain(llm): pass
        @pytest.mark.dtype("bf16")
        def test_own(llm): pass
        @pytest.mark.strategy("served", model_id="prod")
        def test_named(llm): pass
        """
    )
    names = project("--llmload-endpoint", URL, "--collect-only", "-q").stdout.str()
    for name in ("test_plain[tiny-llama-served]", "test_own[tiny-llama-bf16]", "test_named[tiny-llama-served+"):
        assert name in names
    assert "test_plain[tiny-llama-none]" in project("--collect-only", "-q").stdout.str()


def test_the_suite_serves_only_where_it_is_asked_to(project: Callable[..., pytest.RunResult]) -> None:
    suite = ("--pyargs", "pytest_llmload.suite", "--collect-only", "-q")
    assert "served" not in project(*suite).stdout.str()
    with_endpoint = project(*suite, "--llm-endpoint", URL).stdout.str()
    assert "test_memory[tiny-llama-served]" in with_endpoint
    assert "2 tests collected" in with_endpoint
    named = project(*suite, "--llm-endpoint", URL, "--llm-strategy=served", "--llm-strategy=nf4").stdout.str()
    assert "test_memory[tiny-llama-served]" in named
    assert "test_memory[tiny-llama-nf4]" in named
    assert "test_memory[tiny-llama-served]" in project(*suite, "--llm-strategy=served").stdout.str()


#: Markers on a served load -> what is said.
UNTOLD = {
    "quant('fp4')": "served with quant('fp4'): transformers serve supports bnb-8bit (int8) and bnb-4bit (nf4) only",
    "lora()": "served with lora: transformers serve has no option for it; leave it out",
    "device_map({'': 0})": "served with device_map: transformers serve has no option for it",
    "auto_class('AutoModel')": "served with auto_class: transformers serve has no option for it",
    "quant('nf4', compute_dtype='bf16')": "served with compute_dtype: transformers serve has no option for it",
    "device_map('auto')": "contradicting markers: strategy is 'served' by one and 'auto' by another",
    "strategy('served', command='vllm serve {model}')\n@pytest.mark.quant('nf4')": (
        "served with quant: the server's own command (command=) says how it loads"
    ),
    "strategy('served', api='grpc')": "served: unknown api='grpc'; use one of 'openai', 'tgi', 'chat', 'completions'",
}
#: The same with --llm-endpoint.
FOREIGN = {
    "quant('nf4')": "served with quant: a running endpoint (--llm-endpoint) has already loaded its model",
    "dtype('bf16')": "served with dtype: a running endpoint (--llm-endpoint) has already loaded its model",
    "strategy('served', command='x')": "--llm-endpoint names one that is running; use only one of them",
}


@pytest.mark.parametrize(("marks", "options"), [(UNTOLD, ()), (FOREIGN, ("--llm-endpoint", URL))], ids=["own", "given"])
def test_what_cannot_be_told_to_a_server(
    marks: dict[str, str], options: tuple[str, ...], pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    """All of it at once, each with its test."""
    tests = []
    for number, mark in enumerate(marks):
        served = "" if "strategy" in mark else "@pytest.mark.strategy('served')\n"
        tests.append(f"{served}@pytest.mark.{mark}\ndef test_{number}(llm): pass\n")
    pytester.makepyfile("import pytest\n" + "\n".join(tests))
    result = project("--collect-only", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    lines = result.stderr.str().splitlines()
    for number, text in enumerate(marks.values()):
        (line,) = (line for line in lines if f"::test_{number}:" in line)
        assert text in line
