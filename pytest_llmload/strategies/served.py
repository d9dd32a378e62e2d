"""A model behind an endpoint: a server that the load starts, or one that is running already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.job import SERVER, Device
from pytest_llmload.core.spec import AS_STORED
from pytest_llmload.quantisation.registry import Methods
from pytest_llmload.strategies.base import Strategy

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec

#: The schemes that ``transformers serve`` has an option for, and the option's value.
SERVED_SCHEMES = {name: scheme.served for name, (scheme, _) in Methods().schemes.items() if scheme.served is not None}
#: Packages that ``transformers serve`` needs besides transformers.
_SERVER = ("fastapi", "uvicorn", "openai", "pydantic")
#: Packages that the client of any server needs: httpx, and the connections below it, whose reads are timed.
_CLIENT = ("httpx", "httpcore")
#: The protocols that ``api=`` names; the last two are OpenAI's, restricted to one path.
_APIS = ("openai", "tgi", "chat", "completions")
#: Fields of a spec that cannot be passed to a server that the load starts -> their names in markers.
_UNTOLD = {
    "adapter": "lora",
    "device_map": "device_map",
    "max_memory": "max_memory",
    "skip_modules": "skip_modules",
    "compute_dtype": "compute_dtype",
    "auto_class": "auto_class",
    "target": "target",
}
#: Fields that the load cannot pass to a server that the user's command starts, or that is running already.
_OURS_TO_TELL = {**_UNTOLD, "quant": "quant", "dtype": "dtype", "attn": "attn", "env": "env"}


class Served(Strategy):
    """``transformers serve`` on a free loopback port, another server by ``command=``, or ``--llm-endpoint URL``.

    The load's process is the client. ``command=`` is a list, or a text that is split as a shell does, in which
    ``{model}``, ``{host}`` and ``{port}`` are filled in. Options that are not listed here are passed to
    ``transformers serve``: ``continuous_batching=True`` is ``--continuous-batching``.
    """

    name = "served"
    summary = "A running or started endpoint: transformers serve, any OpenAI-compatible URL, text-generation-inference."
    fields: ClassVar[dict[str, Any]] = {"strategy": "served"}
    takes_endpoint = True
    #: ``command``; ``model_id``: the id that the endpoint must serve; ``api``: one of _APIS, detected if not given.
    options: ClassVar[tuple[str, ...]] = ("command", "model_id", "api")
    packages = (*Strategy.packages, *_CLIENT, *_SERVER)
    client_packages = _CLIENT
    #: The server's process imports them, and the load's process imports the client's.
    cold_packages = (*_CLIENT, *_SERVER)
    runs_in = SERVER
    no_model = "the model is in a server, which only answers requests; use llm.generate(), which sends one"

    @classmethod
    def why_not_by_default(cls, device: Device) -> str:
        return "only if --llm-strategy=served requests a server, or --llm-endpoint=URL names one"

    @classmethod
    def refuses(cls, spec: LoadSpec, endpoint: str) -> str:
        if endpoint and spec.option("command"):
            return (
                "strategy('served', command=…) starts a server, and --llm-endpoint names one that is running; "
                "use only one of them"
            )
        if spec.option("api") not in (None, *_APIS):
            return f"served: unknown api={spec.option('api')!r}; use one of {', '.join(map(repr, _APIS))}"
        if endpoint:
            return _untold(spec, _OURS_TO_TELL, "a running endpoint (--llm-endpoint) has already loaded its model")
        if spec.option("command"):
            # The load sets the environment of the server that it starts.
            rest = {field: name for field, name in _OURS_TO_TELL.items() if field != "env"}
            return _untold(spec, rest, "the server's own command (command=) says how it loads")
        if spec.quant != AS_STORED and spec.quant not in SERVED_SCHEMES:
            known = " and ".join(f"{served.flag} ({name})" for name, served in SERVED_SCHEMES.items())
            return f"served with quant({spec.quant!r}): transformers serve supports {known} only"
        return _untold(spec, _UNTOLD, "transformers serve has no option for it")

    @classmethod
    def needs(cls, spec: LoadSpec) -> tuple[str, ...]:
        return (*Strategy.packages, *_CLIENT) if spec.option("command") else cls.packages


def _untold(spec: LoadSpec, fields: dict[str, str], why: str) -> str:
    identity = spec.identity()
    told = [name for field, name in fields.items() if field in identity]
    return f"served with {', '.join(told)}: {why}; leave {'it' if len(told) == 1 else 'them'} out" if told else ""
