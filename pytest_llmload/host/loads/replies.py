"""The replies of a load's process, made fit for reports and terminals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytest_llmload.core.portable import bounded, scrubber
from pytest_llmload.system.logs import LINE
from pytest_llmload.system.protocol import Message

#: Lines of a remote traceback that are kept, from its end, and characters of any other text.
_TRACEBACK_LINES = 200
_TEXT = 4096


def fit(reply: Message) -> Message:
    """Return a reply whose texts are bounded, printable and without secrets, for any error or log of the load."""
    fitting = dict(reply)
    scrub = scrubber()
    if "error" in reply:
        lines = {name: reply["error"][name].splitlines()[-_TRACEBACK_LINES:] for name in ("traceback", "log")}
        texts = {name: "\n".join(bounded(scrub(line), LINE) for line in lines[name]) for name in lines}
        fitting["error"] = {**_fit_texts(reply["error"], scrub), **texts}
    if "result" in reply:
        fitting["result"] = {**_fit_texts(reply["result"], scrub), "spec": reply["result"]["spec"]}
    return fitting


def fit_texts(value: Any) -> Any:
    """Return plain data whose texts are bounded, printable and without secrets."""
    return _fit_texts(value, scrubber())


def _fit_texts(value: Any, scrub: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return bounded(scrub(value), _TEXT)
    if isinstance(value, dict):
        return {scrub(key): _fit_texts(item, scrub) for key, item in value.items()}
    return [_fit_texts(item, scrub) for item in value] if isinstance(value, list) else value
