"""What tests give to ``llm.generate``: texts, token ids, chats, and lists of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def test_lists_and_chats(pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]) -> None:
    pytester.makepyfile(
        ours="""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        def bare(spec): return AutoModelForCausalLM.from_pretrained(spec.model, dtype="auto")

        def without_template(spec):
            tokenizer = AutoTokenizer.from_pretrained(spec.model)
            tokenizer.chat_template = None
            return bare(spec), tokenizer
        """,
        test_it="""
        import pytest

        CHAT = [{"role": "user", "content": "Hi"}]

        def rendered(model, tokenizer, chat):
            return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

        def ids(model, tokenizer, text):
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        def test_list(llm):
            one, two, three = llm.generate(["Hello", "Good day to you", [5, 6, 7]], max_new_tokens=4)
            assert one == llm.generate("Hello", max_new_tokens=4) != two
            assert two == llm.generate("Good day to you", max_new_tokens=4)
            assert three == llm.generate([5, 6, 7], max_new_tokens=4)
            assert [one] == llm.generate(("Hello",), max_new_tokens=4)

        def test_chat(llm):
            answer = llm.generate(CHAT, max_new_tokens=4)
            assert len(answer.tokens) == 4
            assert answer == llm.generate(llm.run(ids, llm.run(rendered, CHAT)), max_new_tokens=4)
            assert llm.generate([CHAT, "Hello"], max_new_tokens=4)[0] == answer

        @pytest.mark.strategy("loader", target="ours:without_template")
        def test_no_template(llm):
            assert llm.generate("Hello", max_new_tokens=2).text
            with pytest.raises(ValueError, match="^[^\\\\n]* has no chat template, [^\\\\n]*$"):
                llm.generate(CHAT)
        """,
    )
    project().assert_outcomes(passed=3)
