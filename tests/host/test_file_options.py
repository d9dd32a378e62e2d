"""Options of from_pretrained that choose files are refused at collection, with what to write instead."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ('subfolder="v1"', "name that folder as the model"),
        ('revision="abc"', "name it in the model: --llm-model=org/model@REVISION"),
        ('variant="fp16"', "under their plain names"),
        ('gguf_file="a.gguf"', "name that file as the model: --llm-model=path/to/FILE.gguf"),
        ("use_safetensors=False", "give a folder that has only the files to load"),
    ],
)
def test_an_option_that_chooses_files(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], option: str, instead: str
) -> None:
    pytester.makepyfile(f"""
        import pytest
        @pytest.mark.strategy("single", {option})
        def test_memory(llm):
            pass
    """)
    result = project("--collect-only")
    assert instead in result.stdout.str() + result.stderr.str()
    assert result.ret != 0
