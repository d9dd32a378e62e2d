"""``--llm-isolation=inline``: the load lives in the pytest process, for debugging."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from pytest_llmload.system.protocol import Message

if TYPE_CHECKING:
    from pytest_llmload.host.loads.progress import Watch
    from pytest_llmload.system.protocol import Channel


class _Nowhere:
    """The channel of a session whose messages are discarded."""

    def send(self, message: Message) -> None:
        pass


class InlineProcess:
    """A substitute for a load process: it gives the same answers in the pytest process."""

    #: The output of ``llm.run`` is printed in the pytest process.
    printed = None
    #: It is this process, which cannot watch itself.
    pid = 0

    def __init__(self) -> None:
        # This is the one place where the pytest process runs the code of a load's process.
        from pytest_llmload.process import session

        self._worker = session
        self._session = session.Session(cast("Channel", _Nowhere()))
        self.alive = True

    def request(
        self,
        message: Message,
        timeout: float,
        entered: Callable[[str], None] | None = None,
        watch: Watch | None = None,
    ) -> Message:
        """Answer a request as LoadProcess.request does, but without a timeout and without a call of ``entered``."""
        try:
            reply: Message = getattr(self._session, f"do_{message['kind']}")(message)
        except self._worker.told() as error:
            reply = self._worker.describe(error, self._session.phase)
        return reply

    @property
    def model(self) -> Any:
        """Return the live model."""
        return self._session.loaded.model

    def tail(self) -> str:
        """Return nothing: what a load prints is the pytest process's own output."""
        return ""

    def close(self) -> None:
        """Drop the model."""
        self.alive = False
        self._session.loaded = None
