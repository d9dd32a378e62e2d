"""The pieces that a measurement is made of, each against an independent answer."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import logging
import mmap
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from loads import checkpoint, job, load, measured

from pytest_llmload.core.environment_entries import ENTRIES
from pytest_llmload.core.job import LOAD_TIME, MEMORY, TIMING
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import Workload
from pytest_llmload.probes import host_memory
from pytest_llmload.probes.anon_sampler import AnonSampler
from pytest_llmload.probes.builtin import probes_for
from pytest_llmload.probes.load_control import LoadControl
from pytest_llmload.probes.manifest import starred
from pytest_llmload.probes.numbers import spread
from pytest_llmload.probes.series import Series
from pytest_llmload.process.environment import environment
from pytest_llmload.process.library_warnings import warnings_of_libraries
from pytest_llmload.quantisation.bitsandbytes import StoredFourBit, scheme_of
from pytest_llmload.quantisation.stored import stored
from pytest_llmload.system import allocator
from pytest_llmload.system.page_cache import page_cache
from pytest_llmload.system.proc import libraries
from pytest_llmload.system.scratch import LOAD, LOGS, Scratch
from pytest_llmload.worker.checkpoints.files import CheckpointFiles
from pytest_llmload.worker.checkpoints.names import CheckpointNames
from pytest_llmload.worker.model.generation import generate, workload_tokens
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.quantisable import out_of_reach, quantisable
from pytest_llmload.worker.model.tensors import Inventory

MIB = 1 << 20


# Quantisation states


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_our_dequantisation_is_the_librarys(scheme: str, nested: bool, storage: torch.dtype) -> None:
    import bitsandbytes

    torch.manual_seed(0)
    module = bitsandbytes.nn.Linear4bit(
        256, 192, bias=False, compress_statistics=nested, quant_type=scheme, quant_storage=storage
    ).to("cpu")
    weight = stored(module, "weight")
    assert isinstance(weight, StoredFourBit)
    assert (weight.scheme, weight.shape, weight.is_nested) == (scheme, (192, 256), nested)
    expected = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).reshape(-1)
    for start, stop in ((0, 64), (100 * 64, 103 * 64), (192 * 256 - 64, 192 * 256), (63, 131)):
        torch.testing.assert_close(weight.dequantised(start, stop), expected[start:stop].float(), rtol=1e-5, atol=1e-7)


def test_our_int8_dequantisation_is_the_librarys() -> None:
    import bitsandbytes

    torch.manual_seed(0)
    module = bitsandbytes.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False, threshold=6.0).to("cpu")
    expected = bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).reshape(-1)
    for _ in range(2):
        weight = stored(module, "weight")
        assert weight is not None
        torch.testing.assert_close(weight.dequantised(200, 500), expected[200:500].float())
        assert weight.describe() == "int8 scale=float32 threshold=6"
        # The first forward moves the scales from the parameter to the module's state.
        module(torch.zeros(1, 128, dtype=torch.float16))


def test_a_dense_weight_has_no_state() -> None:
    assert stored(torch.nn.Linear(4, 4), "weight") is None
    assert stored(torch.nn.Linear(4, 4, bias=False), "bias") is None


# Tensors


class Odd(torch.nn.Module):  # type: ignore[misc]
    """Holds tensors where no parameter list looks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8, 4))
        self.register_buffer("kept", torch.zeros(3))
        self.register_buffer("derived", torch.zeros(5), persistent=False)
        self.tables = {"scales": [torch.zeros(7)], "view": self.weight.detach()[2:]}
        self.weight.extra = torch.zeros(11)
        self.placeholder = torch.nn.Parameter(torch.zeros(100, device="meta"))


def test_torchs_own_attention_is_out_of_reach() -> None:
    model = torch.nn.Module()
    model.attention = torch.nn.MultiheadAttention(64, 4)
    model.linear = torch.nn.Linear(64, 64)
    inventory = Inventory(model)
    assert [weight.name for weight in quantisable(model, inventory)] == ["linear.weight"]
    assert [held.path for held in out_of_reach(inventory)] == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_codes_are_those_of_the_library(scheme: str) -> None:
    from bitsandbytes.functional import get_4bit_type

    assert scheme_of(get_4bit_type(scheme, device="cpu")) == scheme
    assert scheme_of(get_4bit_type("af4", device="cpu")) == ""


def test_every_place_that_holds_a_tensor_is_found_once() -> None:
    inventory = Inventory(torch.nn.Sequential(Odd()))
    found = {held.path: (held.role, held.nbytes, held.persistent) for held in inventory.held}
    assert found == {
        "0.weight": ("parameter", 128, True),
        "0.weight.extra": ("state", 44, True),
        "0.placeholder": ("parameter", 400, True),
        "0.kept": ("buffer", 12, True),
        "0.derived": ("buffer", 20, False),
        "0.tables.scales.0": ("state", 28, True),
        "0.tables.view": ("state", 96, True),
    }
    assert sum(inventory.storages().values()) == 128 + 44 + 12 + 20 + 28


def test_tied_weights_count_once_and_slices_of_a_storage_are_told_apart() -> None:
    whole = torch.zeros(10, 4)
    model = torch.nn.ModuleList([torch.nn.Linear(4, 5, bias=False) for _ in range(3)])
    model[0].weight = torch.nn.Parameter(whole[:5])
    model[1].weight = torch.nn.Parameter(whole[5:])
    model[2].weight = model[0].weight
    inventory = Inventory(model)
    assert sum(inventory.storages().values()) == 160
    assert sum(held.nbytes for held in inventory.distinct()) == 160
    model[1].weight = torch.nn.Parameter(torch.zeros(5, 4))
    inventory = Inventory(model)
    # The first half keeps the whole of its storage alive.
    assert sum(inventory.storages().values()) == 160 + 80
    assert sum(held.nbytes for held in inventory.distinct()) == 160


def test_weights_behind_hooks_are_found_where_they_are(tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    for offload, device in ((cpu_offload, "cpu"), (lambda model: disk_offload(model, str(tmp_path)), "disk")):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        offload(model)
        held = {item.path: item for item in Inventory(model).held}
        assert {item.device for item in held.values()} == {device}
        assert all(item.offloaded for item in held.values())
        assert sum(item.nbytes for item in held.values()) == 2 * (64 + 8) * 4
        assert (sum(Inventory(model).storages().values()) > 0) == (device == "cpu")


# Checkpoints


def test_blocks_of_a_file_are_those_of_the_tensor() -> None:
    from safetensors.torch import load_file

    files = CheckpointFiles(checkpoint("tiny-gpt2").path)
    (file,) = set(files.where.values())
    tensors = load_file(file)
    for name, tensor in tensors.items():
        size = tensor.numel()
        for start, stop in ((0, min(size, 70)), (max(0, size - 65), size), (size // 3, min(size, size // 3 + 100))):
            assert torch.equal(files.block(name, start, stop), tensor.reshape(-1)[start:stop]), name
            if tensor.dim() == 2:
                expected = tensor.T.reshape(-1)[start:stop]
                assert torch.equal(files.block(name, start, stop, transposed=True), expected), name


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gpt-neox", "tiny-gpt2", "tiny-mixtral"])
def test_every_tensor_of_a_model_is_found_in_its_checkpoint(model: str) -> None:
    _, loaded = load(model, measure=False)
    names = CheckpointNames(loaded.model, CheckpointFiles(checkpoint(model).path))
    used: set[str] = set()
    for held in loaded.inventory.distinct():
        if held.role != "parameter":
            continue
        name, fused = names.find(held.path), names.fused(held.path)
        assert name or fused, held.path
        used |= {name} if name else {part for parts in fused.parts for part in parts} if fused else set()
    assert used == set(names.files.where)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_page_cache_is_told_warm_from_cold(tmp_path: Path, share: float) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(4 * MIB))
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        told = page_cache(str(tmp_path))
        if told != "cold":
            pytest.skip("this file system does not drop pages")
        if share:
            os.pread(descriptor, 4 * MIB, 0)
            told = page_cache(str(tmp_path))
    finally:
        os.close(descriptor)
    assert told == ("warm" if share else "cold")


def test_the_page_cache_of_nothing_is_not_told(tmp_path: Path) -> None:
    assert page_cache(str(tmp_path)) == "uncontrolled"


# Memory of the host


def test_the_sampler_ends_although_a_child_of_the_loader_has_its_input_open() -> None:
    sampler = AnonSampler()
    # What a loader does that waits for all its children; and what one does that leaves a child behind.
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
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


# Folders of a load


def killed_with_a_folder(prefix: str, base: Path) -> Path:
    """The folder of a process that ended before it could remove it."""
    program = (
        "import os, sys; from pytest_llmload.system.scratch import Scratch; "
        "print(Scratch(sys.argv[1]).path, flush=True); os._exit(1)"
    )
    command = [sys.executable, "-c", program, prefix]
    killed = subprocess.run(command, env={**os.environ, "TMPDIR": str(base)}, capture_output=True, text=True)
    return Path(killed.stdout.strip())


def test_what_a_killed_load_left_behind_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = killed_with_a_folder(LOAD, tmp_path)
    (left / "files" / "weight.safetensors").write_bytes(b"x")
    unfinished = tmp_path / "llmload-scratch-unfinished"
    unfinished.mkdir()
    other = killed_with_a_folder(LOGS, tmp_path)
    alive = Scratch(LOAD)
    second = Scratch(LOAD)
    assert other.is_dir()
    Scratch(LOGS).close()
    assert not left.exists()
    assert alive.files.is_dir()
    assert unfinished.is_dir()
    for scratch in (alive, second, second):
        scratch.close()
    assert list(tmp_path.iterdir()) == [unfinished]


def test_a_folder_is_nobody_elses_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    flock = fcntl.flock

    def another_comes_first(descriptor: int, operation: int) -> None:
        monkeypatch.setattr("fcntl.flock", flock)
        Scratch(LOAD).close()
        flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", another_comes_first)
    scratch = Scratch(LOAD)
    assert scratch.files.is_dir()
    scratch.close()
    assert list(tmp_path.iterdir()) == []


def test_weights_on_disk_live_as_long_as_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, loaded = load("tiny-mixtral", strategy="offload", measure=False)
    assert len(list(tmp_path.glob(f"{LOAD}*"))) == 1
    loaded.close()
    assert list(tmp_path.glob(f"{LOAD}*")) == []


# Small things


def test_fixed_tokens_are_fixed() -> None:
    rows = workload_tokens(Workload(2, 4, 1), 1000)
    assert rows == [[361, 949, 273, 618], [311, 770, 828, 146]]
    assert all(64 <= token < 1000 for row in rows for token in row)
    assert all(0 <= token < 50 for row in workload_tokens(Workload(1, 200, 1), 50) for token in row)
    assert rows[0] == workload_tokens(Workload(1, 9, 1), 1000)[0][:4]


@pytest.mark.parametrize(
    ("path", "pattern", "number"),
    [
        ("model.layers.7.mlp.up_proj", "model.layers.*.mlp.up_proj", 7),
        ("model.layers.12.experts.3.w1", "model.layers.*.experts.3.w1", 12),
        ("0", "*", 0),
        ("lm_head", "lm_head", None),
        ("conv1.weight2", "conv1.weight2", None),
    ],
)
def test_alike_modules_share_a_pattern(path: str, pattern: str, number: int | None) -> None:
    assert starred(path) == (pattern, number)


def test_spread_takes_both_ends() -> None:
    assert spread(3, 8) == [0, 1, 2]
    assert spread(100, 3) == [0, 49, 99]
    assert len(set(spread(9, 8))) == 8


def test_reports_of_the_libraries_are_captured_though_silenced() -> None:
    logger = logging.getLogger("transformers.modeling_utils")
    parent = logging.getLogger("transformers")
    level = parent.level
    parent.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with warnings_of_libraries() as lines:
                logger.warning("\x1b[1mLlamaForCausalLM LOAD REPORT\x1b[0m from: x")
                logger.info("not this")
    finally:
        assert parent.level == logging.ERROR
        parent.setLevel(level)
    assert lines == ["transformers.modeling_utils: LlamaForCausalLM LOAD REPORT from: x"]


def test_the_environment_holds_nothing_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4096")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    found = environment(job("tiny-llama"))
    assert found["malloc"] == "by MALLOC_MMAP_THRESHOLD_"
    assert found["allocator"] == "expandable_segments:True"
    assert "secret" not in str(found)
    assert str(Path.home()) not in str(found)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    assert environment(job("tiny-llama"))["malloc"] == "system"


#: Entries that only some loads have, and of whom they are.
ONLY_SOME = {
    "cuda": "torch for NVIDIA", "rocm": "torch for AMD", "gpu": "a GPU", "driver": "a GPU", "libc": "glibc",
    "bitsandbytes": "installed", "peft": "installed", "kernels": "imported", "flash_attn": "imported",
    "deepspeed": "its strategy", "tensor_parallel": "its strategy", "ranks": "parallel strategies",
    "server": "endpoints", "revision": "endpoints", "allocator": "set by the user",
}  # fmt: skip


def test_every_entry_of_the_environment_is_declared_and_every_declared_one_is_there() -> None:
    result = measured("tiny-llama", attn="eager")
    assert set(result.environment) <= set(ENTRIES)
    assert set(ENTRIES) - set(result.environment) <= set(ONLY_SOME)
    assert result.environment["attn"] == "eager"


@pytest.mark.parametrize("name", ["deepspeed", "tensor_parallel"])
def test_the_library_of_a_strategy_is_an_entry_of_its_loads_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: f"{package} 1.0")
    # The warm server has imported it for another load.
    monkeypatch.setitem(sys.modules, "tensor_parallel", ModuleType("tensor_parallel"))
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    assert name not in environment(job("tiny-llama"))
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert environment(job("tiny-llama", strategy=name, world_size=2))[name] == f"{name} 1.0"


def test_a_workload_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"workload 1x100000\+8 needs 100008 positions, the model has"):
        load("tiny-llama", workload=Workload(1, 100000, 8))


_BLOCKS = """
import ctypes
from pytest_llmload.system import allocator

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usm fsm uord ford keep".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def mapped():
    # A free place that the interpreter left in the heap may take some of them.
    before = libc.mallinfo2().hblks
    for _ in range(64):
        libc.malloc(100 << 10)
    return libc.mallinfo2().hblks - before

def freed():
    # 64 MiB below a block that is still used: the heap keeps them.
    blocks = [libc.malloc(1 << 20) for _ in range(65)]
    for block in blocks:
        ctypes.memset(block, 1, 1 << 20)
    for block in blocks[:-1]:
        libc.free(block)

"""
_PINNED = """
stands = allocator.pin()
pinned = mapped()
allocator.unpin()
print(stands, pinned, mapped())
"""
_TRIMMED = """
from pytest_llmload.system.proc import rollup
allocator.unpin()
freed()
before = rollup()["Anonymous"]
allocator.trim()
print(allocator.setting(), before >> 20, rollup()["Anonymous"] >> 20)
"""
_FORWARD = """
from pytest_llmload.probes.host_memory import HostMemory
probe = HostMemory(None)
probe.start()
probe.mark()
probe.loaded(None)
probe.forwarding()
freed()
probe.forwarded(None)
probe.close()
settled = probe.settled["Anonymous"] - probe.base["Anonymous"]
print(probe.malloc, probe.peaks["forward"] >> 20, settled >> 20)
"""
_PROBED = """
from pytest_llmload.probes.host_memory import HostMemory
probe = HostMemory(None)
probe.start()
probe.mark()
pinned = mapped()
probe.{end}
print(probe.malloc, pinned, mapped())
probe.close()
"""


def blocks(program: str, tuned: dict[str, str]) -> tuple[str, int, int]:
    """How the allocator stands, and the two numbers that the program prints after it."""
    env = {name: value for name, value in os.environ.items() if name not in allocator.USERS} | tuned
    run = subprocess.run([sys.executable, "-c", _BLOCKS + program], env=env, capture_output=True, text=True, check=True)
    said, pinned, after = run.stdout.rsplit(maxsplit=2)
    return said, int(pinned), int(after)


@pytest.mark.parametrize(
    ("tuned", "stands", "let_go"),
    [
        ({}, "mmap_threshold=65536", False),
        ({"MALLOC_MMAP_THRESHOLD_": "4096"}, "by MALLOC_MMAP_THRESHOLD_", True),
    ],
)
def test_the_allocator_is_pinned_and_left_alone_again(tuned: dict[str, str], stands: str, let_go: bool) -> None:
    said, pinned, after = blocks(_PINNED, tuned)
    assert said == stands
    assert pinned >= 48
    assert (after >= 48) == let_go


@pytest.mark.parametrize(
    ("tuned", "given_back"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "1000000000"}, False)], ids=["ours", "user's"]
)
def test_what_the_heap_keeps_of_freed_blocks_is_given_back(tuned: dict[str, str], given_back: bool) -> None:
    _, before, after = blocks(_TRIMMED, tuned)
    assert (before - after >= 60) == given_back


def test_what_the_heap_keeps_of_a_forward_is_in_its_peak_and_not_in_what_is_settled() -> None:
    _, peak, settled = blocks(_FORWARD, {})
    assert peak >= 64
    assert settled <= 4


def test_the_allocator_stays_pinned_for_every_figure_of_memory() -> None:
    """Else temporaries come from a heap that fragments differently in each process, and clean loads are called red."""
    for moment in ("loaded(None)", "forwarding()", "forwarded(None)", "generating()"):
        _, pinned, after = blocks(_PROBED.format(end=moment), {})
        assert pinned >= 48, moment
        assert after >= 48, moment


@pytest.mark.parametrize("end", ["generated(None)", "close()"])
def test_the_allocator_is_let_go_when_the_load_ends_however_it_does(end: str) -> None:
    """Else what is run on the model afterwards would be slower than without us."""
    said, pinned, after = blocks(_PROBED.format(end=end), {})
    assert said == "mmap_threshold=65536"
    assert pinned >= 48
    assert after == 0


def test_a_tokenizer_that_does_not_load_is_told_to_who_asks_for_text(tmp_path: Path) -> None:
    files = checkpoint("tiny-llama")
    shutil.copytree(files.path, tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    result, loaded = load(dataclasses.replace(files, path=str(tmp_path / "broken")))
    assert not result.problems
    with pytest.raises(ValueError, match=r"no tokenizer for the text \(.*\); give token ids instead"):
        generate(loaded, "hello", 2)
    assert loaded.tokenizer_error != Loaded.tokenizer_error
    assert len(generate(loaded, [1, 2, 3], 2)["tokens"]) == 2


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
def test_a_fork_that_owns_its_pages_copies_none_while_it_is_timed(own: bool) -> None:
    """Page faults, which no clock blurs, of 16 MiB that the parent has written and the child writes again."""
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            f"""
import os, resource
from pytest_llmload.system import process
block = bytearray(b"1") * (16 << 20)
if os.fork() == 0:
    assert process.own_pages() if {own} else True
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block[::4096] = b"2" * (len(block) // 4096)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
    os._exit(0)
os.wait()
""",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    assert (int(told.stdout) < 100) == own


# --- controls --------------------------------------------------------------------------------------------------------


def test_a_load_that_is_judged_has_its_ratio_to_a_control_around_it() -> None:
    result = load("tiny-llama", figures=(LOAD_TIME,), checks=False)[0]
    (before, after), (ratio,) = result.samples["load.control"], result.samples["load.relative"]
    assert ratio == pytest.approx(result.metrics["load"] / ((before + after) / 2))
    assert LoadControl not in probes_for((MEMORY, TIMING)), "its memory would be in the figures"
