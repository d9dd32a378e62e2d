"""Texts, token ids and chats as prompts, and one sentence for what cannot be a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pytest_llmload.worker.checkpoints.tokenizer import write_tokenizer
from pytest_llmload.worker.model.prompts import chat_text, token_ids, without_bos

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_a_prompt_is_text_ids_or_a_chat(tokenizer: Any) -> None:
    assert token_ids(None, "none here", [3, 4]) == [3, 4]
    assert token_ids(tokenizer, "", "Hi") == tokenizer("Hi")["input_ids"]
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|assistant|>")
    assert tokenizer.decode(token_ids(tokenizer, "", CHAT)) == text


def test_the_template_of_two_turns(tokenizer: Any) -> None:
    turns = [*CHAT, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "So?"}]
    assert chat_text(tokenizer, "", turns) == "<|user|>Hi\n<|assistant|>Ho\n<|user|>So?\n<|assistant|>"


def test_what_is_missing_is_one_sentence(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^no tokenizer for the text \(no such file\); give token ids instead$"):
        token_ids(None, "no such file", "Hi")
    with pytest.raises(ValueError, match=r"^no tokenizer for the chat's messages \(no such file\); give token ids"):
        token_ids(None, "no such file", CHAT)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(
        ValueError, match=r"^the chat template does not take these messages: TemplateError: roles must a"
    ):
        token_ids(tokenizer, "", CHAT)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(
        ValueError, match=r"has no chat template, so it makes no prompt of a chat's messages: give text"
    ):
        token_ids(tokenizer, "", CHAT)


class Beginning:
    """A tokenizer that begins each text with a token of its own."""

    bos_token, bos_token_id = "<s>", 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *map(ord, text)]}


def test_the_token_that_begins_a_text_is_not_there_twice(tokenizer: Any) -> None:
    assert without_bos(Beginning(), "<s>Hi") == "Hi"
    assert without_bos(tokenizer, tokenizer.bos_token + "Hi") == tokenizer.bos_token + "Hi"
