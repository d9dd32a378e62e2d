"""The base of probes that sample in a thread while the model loads."""

from __future__ import annotations

import threading
from typing import ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.probes.base import Probe
from pytest_llmload.worker.model.loaded import Loaded


class LoadSampler(Probe):
    """Runs ``sample`` in a thread. It waits for ``begun``, which ``loading`` sets, and returns after ``ended`` is set.

    The thread also ends if no load begins: both events are set when the probe is closed.
    """

    partial = True
    thread_name: ClassVar[str]

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.begun, self.ended = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        # Before the other probes' marks, so that the thread's own memory is not part of a figure.
        self.thread = threading.Thread(target=self.sample, name=self.thread_name, daemon=True)
        self.thread.start()

    def loaded(self, loaded: Loaded) -> None:
        self.close()

    def close(self) -> None:
        self.ended.set()
        self.begun.set()
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def sample(self) -> None:
        raise NotImplementedError
