"""What may be committed: no secret, no path of this machine, and no name that only looks like one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pytest_llmload.core.portable import portable_spec, scrub


def portable(name: str, value: object) -> Any:
    """One option as it is stored."""
    ((_, text),) = portable_spec({"options": [[name, json.dumps(value)]]})["options"]
    return json.loads(text)


@pytest.mark.parametrize(
    ("command", "stored"),
    [
        (["vllm", "serve", "{model}", "--api-key", "abc"], ["vllm", "serve", "{model}", "--api-key", "***"]),
        (["vllm", "--api-key=abc", "--port={port}"], ["vllm", "--api-key=***", "--port={port}"]),
        (["env", "HF_TOKEN=abc", "A=b", "tgi"], ["env", "HF_TOKEN=***", "A=b", "tgi"]),
        (["x", "--hf-token", "abc", "--password", "d", "y"], ["x", "--hf-token", "***", "--password", "***", "y"]),
        (["x", "--my_secret", 7], ["x", "--my_secret", "***"]),
        (["x", "--auth", "--port", "8000"], ["x", "--auth", "--port", "8000"]),
        (["x", "--max-num-batched-tokens", "8192"], ["x", "--max-num-batched-tokens", "8192"]),
        (["/opt/bin/vllm", "--chat-template=/home/joe/t.jinja", 3], ["vllm", "--chat-template=t.jinja", 3]),
        ("/opt/bin/vllm serve {model} --api-key 'a b'", ["vllm", "serve", "{model}", "--api-key", "***"]),
        ("vllm serve it's", ["vllm", "serve", "it's"]),
    ],
)
def test_a_command_is_stored_without_its_secrets_and_its_machine(
    command: list[str | int] | str, stored: list[str | int]
) -> None:
    assert portable("command", command) == stored


def test_different_commands_stay_different() -> None:
    assert portable("command", "/bin/a serve x/y") != portable("command", "/bin/b serve z/y")


@pytest.mark.parametrize("name", ["Authorization", "X-Api-Key", "apikey", "hf_token", "Cookie", "password"])
def test_a_map_hides_what_is_called_like_a_secret(name: str) -> None:
    assert portable("headers", {"Accept": "x", "more": [{name: "open sesame"}]}) == {
        "Accept": "x",
        "more": [{name: "***"}],
    }


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijklmnopqrstuvwx",
        "ghp_abcdefghijklmnopqrst0123456789ABCDEF",
        "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz",
        "sk-abcdefghijklmnopqrstuvwxyz012345",
        "sk-proj-Ab1_Cd2Ef3Gh4Ij5Kl6Mn7-Op8",
        "sk-ant-api03-Ab1Cd2Ef3Gh4Ij5Kl6Mn7",
        "AKIAABCDEFGHIJKLMNOP",
    ],
)
def test_tokens_are_hidden_in_any_text(secret: str) -> None:
    assert scrub(f"refused {secret}: try again") == "refused ***: try again"
    assert portable("note", [secret]) == ["***"]


def test_what_http_sends_is_hidden() -> None:
    assert scrub("sent Authorization: Bearer abc.def-ghi") == "sent Authorization: Bearer ***"
    assert scrub("authorization: Basic bWU6cGFzcw==") == "authorization: Basic ***"


@pytest.mark.parametrize(
    "text",
    [
        "hf_transfer and hf_quantizer.preprocess_model",
        "sk-learn/some-model-of-many-words-7b-instruct",
        "disk-abcdefghijklmnopqrstuvwxyz",
        "ghp_actions",
        "max_new_tokens=5",
        "org/model@abcdefabcdefabcdefabcdefabcdefabcdefabcd",
    ],
)
def test_names_that_look_like_tokens_stay(text: str) -> None:
    assert scrub(text) == text


def test_the_values_of_secret_variables_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_ENDPOINT_KEY", "swordfish-17")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish-17/longer")
    monkeypatch.setenv("DEPLOY_KEY", "first line of it\nsecond line of it")
    monkeypatch.setenv("DEBUG_TOKEN", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "swordfish-is-none")
    assert scrub("got swordfish-17/longer and swordfish-17!") == "got *** and ***!"
    assert scrub("second line of it") == "***"
    assert scrub("1 of 2, swordfish-is-none") == "1 of 2, swordfish-is-none"
    monkeypatch.delenv("LLM_ENDPOINT_KEY")
    assert scrub("swordfish-17!") == "swordfish-17!"


def test_what_turns_text_around_is_escaped() -> None:
    assert scrub("a\u202eb\u2066") == "a\\u202eb\\u2066"
