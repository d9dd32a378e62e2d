"""The model's settings: configuration, modes, attention, cache, and the files that were opened."""

from __future__ import annotations

from pathlib import Path

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import LoadResult
from pytest_llmload.probes.base import Probe
from pytest_llmload.system.file_events import OpenedFiles
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.settings import cache_settings, settings

#: Suffixes of files that contain weights.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack")


class ModelSettings(Probe):
    """Fills ``settings`` of the result; reads them after all measurements."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.files: OpenedFiles | None = None
        self.settings: dict[str, str] = {}

    def mark(self) -> None:
        folder = Path(self.job.checkpoint.path)
        paths = sorted(path for path in folder.rglob("*") if path.suffix in _WEIGHTS and path.is_file())
        self.files = OpenedFiles(paths)

    def returned(self) -> None:
        assert self.files is not None
        opened = self.files.close()
        if not self.files.complaint:
            self.settings["files"] = ", ".join(opened) or "none"

    def finished(self, loaded: Loaded) -> None:
        self.settings |= settings(loaded)
        run = loaded.padded_run
        if run is not None and run.generated:
            self.settings |= cache_settings(run.cache, run.tokens, run.rows)

    def fill(self, result: LoadResult) -> None:
        if len(self.settings) > 1:
            result.settings = self.settings

    def close(self) -> None:
        if self.files is not None:
            self.files.close()
