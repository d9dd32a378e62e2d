"""Warnings of the libraries during a load."""

from __future__ import annotations

import logging
import warnings

from pytest_llmload.process.library_warnings import warnings_of_libraries


def test_reports_of_the_libraries_are_captured_though_silenced() -> None:
    logger = logging.getLogger("transformers.modeling_utils")
    parent = logging.getLogger("transformers")
    level = parent.level
    parent.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with warnings_of_libraries() as lines:
                logger.warning("\x1b[1mLlamaForCausalLM LOAD REPORT\x1b[0m from: x")
                logger.info("not this")
    finally:
        assert parent.level == logging.ERROR
        parent.setLevel(level)
    assert lines == ["transformers.modeling_utils: LlamaForCausalLM LOAD REPORT from: x"]
