"""``--llm-isolation=inline``: the load lives in the pytest process, for debugging."""

from __future__ import annotations

import importlib
from typing import Any

from pytest_llmload.system.protocol import Message


class _Nowhere:
    """The channel of a session that nobody listens to."""

    def send(self, message: Message) -> None:
        pass


class InlineProcess:
    """Answers what a load process answers, without one."""

    def __init__(self) -> None:
        # By name: this is the one place where the pytest process runs a worker's code.
        self._worker = importlib.import_module("pytest_llmload.process.session")
        self._session = self._worker.Session(_Nowhere())
        self.alive = True

    def request(self, message: Message, timeout: float) -> Message:
        """As LoadProcess.request; a hang is not cut short here."""
        try:
            reply: Message = getattr(self._session, f"do_{message['kind']}")(message)
        except self._worker.told() as error:
            reply = self._worker.describe(error, self._session.phase)
        return reply

    @property
    def model(self) -> Any:
        return self._session.loaded.model

    def tail(self) -> str:
        return ""

    def close(self) -> None:
        self.alive = False
        self._session.loaded = None

    def kill(self) -> None:
        self.close()
