"""Send a test's function to the load's process, and raise in pytest's process what it raised there."""

from __future__ import annotations

import base64
import builtins
import io
import pickle
import sys
from collections import ChainMap
from collections.abc import Callable
from types import CodeType
from typing import Any, ClassVar, NoReturn

import pytest

from pytest_llmload.core.errors import RemoteError
from pytest_llmload.core.portable import scrub
from pytest_llmload.core.references import is_reference
from pytest_llmload.core.results import ErrorInfo
from pytest_llmload.system.protocol import Message

#: The exceptions of ``pytest.skip``, ``fail`` and ``xfail``, by the names that the classes give themselves.
_OUTCOMES: dict[str, type[BaseException]] = {
    "Skipped": pytest.skip.Exception,
    "Failed": pytest.fail.Exception,
    "_pytest.outcomes.XFailed": pytest.xfail.Exception,
}


#: The text that cloudpickle writes in place of the name of a code object's file.
_NO_FILE = "<dynamic-code>"


def encode(function: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Message:
    """Encode a call: a function is sent by value, with the module it is written in; ``"module:function"`` by name.

    Raises TypeError if something the function refers to cannot be sent.
    """
    __tracebackhide__ = True
    import cloudpickle

    if not (is_reference(function) if isinstance(function, str) else callable(function)):
        raise TypeError(f"llm.run takes a function, or a text 'module:function'; got {function!r:.80}")
    if isinstance(function, str):
        return {"kind": "run", "target": function, "arguments": _text(cloudpickle.dumps((args, kwargs)))}
    module = sys.modules.get(getattr(function, "__module__", ""))
    by_value = module is not None and module.__name__ not in cloudpickle.list_registry_pickle_by_value()
    if by_value:
        # The load's process has not collected the tests: it could not import their modules.
        cloudpickle.register_pickle_by_value(module)
    try:
        payload = _dumps((function, args, kwargs))
    except (TypeError, pickle.PicklingError, AttributeError) as error:
        name = getattr(function, "__qualname__", repr(function))
        raise TypeError(f"{name} cannot go to the load's process: {error}") from error
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(module)
    return {"kind": "run", "payload": _text(payload)}


def _dumps(value: object) -> bytes:
    """Pickle by value, as cloudpickle does, but let code keep the name of its file.

    cloudpickle 3.1 writes "<dynamic-code>" in its place, so that equal code gives equal bytes; tracebacks and warnings
    would not say where they come from.
    """
    import cloudpickle

    def reduced(code: CodeType) -> tuple[Any, ...]:
        kind, fields = cloudpickle.Pickler.dispatch_table[CodeType](code)
        return kind, tuple(code.co_filename if field == _NO_FILE else field for field in fields)

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        dispatch_table: ClassVar[ChainMap[type, Any]] = ChainMap(
            {CodeType: reduced}, cloudpickle.Pickler.dispatch_table
        )

    data = io.BytesIO()
    Pickler(data).dump(value)
    return data.getvalue()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def decode(reply: Message) -> Any:
    """Return the plain value of a reply. Raises what the function raised."""
    __tracebackhide__ = True
    if reply["kind"] == "error":
        raise_here(reply)
    return pickle.loads(base64.b64decode(reply["payload"]))


def raise_here(reply: Message) -> NoReturn:
    """Raise a remote exception: as its own class if pytest's process knows that class, else as RemoteError."""
    __tracebackhide__ = True
    info = ErrorInfo(**reply["error"])
    module, _, name = info.type_name.rpartition(".")
    holder = sys.modules.get(module) if module else builtins
    kind = getattr(holder, name, None)
    if info.type_name in _OUTCOMES:
        outcome = _OUTCOMES[info.type_name](scrub(info.message))
        raise outcome from RemoteError(info.message, info.type_name, info.traceback)
    why = ""
    # ``pytest.exit`` is for the pytest process to call: one test's function does not end the whole run.
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, pytest.exit.Exception):
        given = reply.get("arguments")
        arguments = pickle.loads(base64.b64decode(given)) if given else (info.message,)
        try:
            # As printable as its message: pytest-xdist cannot send a report that no encoding can write.
            error = kind(*(scrub(item) if isinstance(item, str) else item for item in arguments))
        except Exception as refused:  # noqa: BLE001 - a constructor may do anything
            why = f"; it cannot be made again here: {type(refused).__name__}: {scrub(str(refused))}"
        else:
            raise error from RemoteError(info.message, info.type_name, info.traceback)
    raise RemoteError(f"{info.message}{why}", info.type_name, info.traceback)
