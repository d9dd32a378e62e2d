"""Run a test's function in the model's process, and send plain data back."""

from __future__ import annotations

import base64
import pickle
import sys
from pathlib import PurePath
from time import perf_counter
from typing import Any

from pytest_llmload.core.references import resolve
from pytest_llmload.system.protocol import Message
from pytest_llmload.worker.model.device import synchronize

#: The most characters of an exception's encoded arguments that are sent.
_MOST = 4096
_SCALARS = (type(None), bool, int, float, complex, str, bytes)


def call(message: Message, loaded: Any) -> Message:
    """Call ``function(model, tokenizer, *args, **kwargs)``; return its value, and its seconds until the device is done.

    The function comes by value (cloudpickle) or as ``"module:function"``. Raises TypeError if it returns anything other
    than plain data, since the pytest process must not import torch to unpickle it.
    """
    if "target" in message:
        function = resolve(message["target"])
        args, kwargs = pickle.loads(base64.b64decode(message["arguments"]))
    else:
        function, args, kwargs = pickle.loads(base64.b64decode(message["payload"]))
    model, tokenizer = loaded.outermost, loaded.tokenizer
    synchronize(loaded.job)
    begin = perf_counter()
    value = function(model, tokenizer, *args, **kwargs)
    synchronize(loaded.job)
    seconds = perf_counter() - begin
    check_plain(value)
    return {"kind": "value", "payload": base64.b64encode(pickle.dumps(value)).decode(), "seconds": seconds}


def arguments(error: BaseException) -> str:
    """Return the pickled arguments with which the pytest process can make an exception of the same class.

    Empty if they are not plain data or too large; the pytest process then has the message only, which may be cut.
    """
    # By ``__reduce__``, as pickle does: the file name of an OSError is not in its ``args``.
    try:
        reduced = error.__reduce__()
    except Exception:  # noqa: BLE001 - the exception's class is code of the user or of a library
        return ""
    if not isinstance(reduced, tuple) or len(reduced) < 2 or reduced[0] is not type(error):
        return ""
    plain = tuple(str(item) if isinstance(item, PurePath) else item for item in reduced[1])
    try:
        check_plain(plain)
    except TypeError:
        return ""
    data = base64.b64encode(pickle.dumps(plain)).decode()
    return data if len(data) <= _MOST else ""


def check_plain(value: Any, where: str = "the value returned") -> None:
    """Raise TypeError unless the value consists of numbers, strings, bytes and containers of them."""
    if type(value) in _SCALARS:
        return
    if type(value) in (list, tuple, set, frozenset):
        for item in value:
            check_plain(item, f"an item of {where}")
        return
    if type(value) is dict:
        for key, item in value.items():
            check_plain(key, f"a key of {where}")
            check_plain(item, f"{where}[{key!r}]")
        return
    kind = type(value)
    torch = sys.modules.get("torch")
    hint = "return .tolist() or .item()" if torch and isinstance(value, torch.Tensor) else "return plain data"
    raise TypeError(f"{where} is a {kind.__module__}.{kind.__qualname__}, which stays in the load's process: {hint}")
