"""Host memory: the sampler of its peaks, and the libraries that the kernel lists."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import pytest
from loads import job

from pytest_llmload.core.results import LoadResult
from pytest_llmload.probes import host_memory
from pytest_llmload.probes.anon_sampler import AnonSampler
from pytest_llmload.probes.series import Series
from pytest_llmload.system.proc import libraries
from pytest_llmload.system.process_tree import descendants

MIB = 1 << 20


def test_the_sampler_ends_although_a_child_of_the_loader_has_its_input_open() -> None:
    children = descendants(os.getpid())
    sampler = AnonSampler()
    # A loader may wait for all its children, of which the sampler is none; or leave a child behind, as here.
    assert descendants(os.getpid()) == children
    done, release = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(release)
        os.read(done, 1)
        os._exit(0)
    try:
        assert sampler.take() is not None
        assert sampler.close() == ""
    finally:
        os.close(release)
        os.close(done)
        os.waitpid(child, 0)


def test_a_transient_allocation_is_sampled() -> None:
    sampler = AnonSampler()
    sampler.take()
    resting = sampler.take()
    held = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE)
    for page in range(0, 64 * MIB, mmap.PAGESIZE):
        held[page] = 1
    begun = time.monotonic()
    sampler.take()
    seen = sampler.take()
    held.close()
    series = sampler.series
    assert sampler.close() == ""
    assert resting is not None
    assert seen is not None
    assert seen - resting > 60 * MIB
    assert max(size for _, size in series) == seen
    moments = [begun, *(moment for moment, _ in series), time.monotonic()]
    assert moments == sorted(moments)


def test_samples_over_time_are_bounded_and_keep_the_highest() -> None:
    series = Series(8)
    for moment in range(100):
        series.add(moment / 2, 900 if moment == 41 else moment)
        assert len(series.points) <= 8
    assert series.peak == 900
    # Each point stands for sixteen samples, the last one for those since the point before it.
    assert [moment for moment, _ in series.points] == [7.5, 15.5, 23.5, 31.5, 39.5, 47.5, 49.5]
    assert [size for _, size in series.points] == [15, 31, 900, 63, 79, 95, 99]


def test_resident_libraries_are_those_that_the_kernel_lists() -> None:
    def listed() -> int:
        total, counting = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024 if counting else 0
            elif not line[0].isupper():
                counting = ".so" in line.rpartition("/")[2]
        return total

    before, found, after = listed(), libraries(), listed()
    assert before <= found <= after
    assert found > 20 * MIB


def test_a_kernel_that_hides_pages_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden() -> int:
        raise FileNotFoundError(2, "No such file or directory", "/proc/self/pagemap")

    monkeypatch.setattr(host_memory, "libraries", hidden)
    probe = host_memory.HostMemory(job("tiny-llama"))
    probe.start()
    probe.mark()
    probe.loaded(None)  # type: ignore[arg-type]
    result = LoadResult({}, "loaded")
    probe.fill(result)
    assert "/proc/self/pagemap" in result.unavailable["host.peak"]
    assert "host.peak" not in result.metrics
    assert "host.anon_peak" in result.metrics


def test_a_helper_that_ends_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = host_memory.HostMemory(job("tiny-llama"))
    probe.start()
    assert probe.sampler is not None
    probe.mark()
    # As the end of a load tells it.
    probe.sampler._orders.write(b".")
    probe.loaded(None)  # type: ignore[arg-type]
    result = LoadResult({}, "loaded")
    probe.fill(result)
    assert "the sampling process ended" in result.unavailable["host.anon_peak"]
    assert result.unavailable["host.settled"] == "no forward has run"
    assert "host.peak" in result.metrics
