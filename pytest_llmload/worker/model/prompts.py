"""What a test generates from: text, the ids of its tokens, or the messages of a chat."""

from __future__ import annotations

from typing import Any

Prompt = str | list[int] | list[dict[str, Any]]


def is_chat(prompt: Prompt) -> bool:
    """Return whether a prompt is the messages of a chat."""
    return isinstance(prompt, list) and isinstance(prompt[0], dict)


def token_ids(tokenizer: Any, missing: str, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt. Raises ValueError for text without a tokenizer; ``missing`` says why."""
    if isinstance(prompt, list) and not is_chat(prompt):
        return [int(token) for token in prompt]  # type: ignore[arg-type]
    if tokenizer is None:
        what = "the chat's messages" if is_chat(prompt) else "the text"
        raise ValueError(f"no tokenizer for {what} ({missing}); give token ids instead")
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    # A template writes the special tokens itself.
    return list(tokenizer(chat_text(tokenizer, missing, prompt), add_special_tokens=False)["input_ids"])


def chat_text(tokenizer: Any, missing: str, messages: Any) -> str:
    """Return the text that the tokenizer's template makes of a chat, up to where the model is to answer.

    Raises ValueError if there is no tokenizer, if it has no template, or if the template refuses the messages.
    """
    if tokenizer is None:
        raise ValueError(f"no tokenizer for the chat's messages ({missing}); give token ids or text instead")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{type(tokenizer).__name__} has no chat template, so it makes no prompt of a chat's messages: give text, "
            "or set tokenizer.chat_template in the loader"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the chat template does not take these messages: {type(error).__name__}: {reason}") from error


def without_bos(tokenizer: Any, text: str) -> str:
    """Return a chat's text without the token that begins it, where the code that tokenises it adds that again."""
    first = tokenizer.bos_token
    adds = first is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(first) if adds else text
