"""The environment of a served model: this machine's, as far as the server shares it, and the server's libraries."""

from __future__ import annotations

from pytest_llmload.core.environment_entries import ENTRIES, MACHINE
from pytest_llmload.core.job import Job
from pytest_llmload.process.environment import environment
from pytest_llmload.process.serving.server_versions import versions

#: Entries that a server started by a command shares with this process.
_OF_THE_MACHINE = ("malloc", *(entry.name for entry in ENTRIES.values() if entry.kind == MACHINE))


def server_environment(job: Job, pid: int | None, *, ours: bool) -> dict[str, str]:
    """Return the environment of a server that the load started, with process ``pid``, or of a running endpoint.

    ``ours`` is true for a ``transformers serve`` that the load started, which has this interpreter and its libraries.
    """
    if job.endpoint:
        # Only the client runs on this machine; an endpoint's times are compared with its own earlier ones.
        return {"host": "endpoint"}
    own = environment(job)
    if ours:
        return own
    machine = {name: value for name, value in own.items() if name in _OF_THE_MACHINE}
    return machine | (versions(pid) if pid is not None else {})
