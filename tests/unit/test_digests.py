"""The shape digest survives what does not change a load; the weights digest sees every byte; damage is a sentence."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_llmload.core.errors import LoadFailed
from pytest_llmload.core.presets import PRESETS
from pytest_llmload.worker.checkpoints import digests, headers
from pytest_llmload.worker.checkpoints.build import build, write_weights
from pytest_llmload.worker.checkpoints.files import CheckpointFiles
from pytest_llmload.worker.checkpoints.headers import StoredTensor, Tensor, read_header
from pytest_llmload.worker.checkpoints.resolve import resolve
from pytest_llmload.worker.checkpoints.weights import read_tensors, weight_files

TENSORS = [Tensor("a.weight", (4, 2), "BF16"), Tensor("b.weight", (4,), "F32")]
TINY = [name for name in PRESETS if name.startswith("tiny-")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(PRESETS["tiny-llama"], "tiny-llama", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def checkpoint(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "checkpoint"))


def shape(**changes: Any) -> str:
    return digests.shape_digest({**PRESETS["tiny-llama"], **changes}, TENSORS)


@pytest.mark.parametrize(
    "noise",
    [
        {"_name_or_path": "/home/me/model"},
        {"transformers_version": "9.9"},
        {"dtype": None, "torch_dtype": "float32"},
        {"use_cache": False},
        {"eos_token_id": [1, 2], "pad_token_id": None},
        {"attention_dropout": 0.1, "initializer_range": 0.1},
        {"head_dim": None},
        {"rope_parameters": {"rope_theta": 10000.0}},
        {"id2label": {"0": "a"}, "architectures": ["LlamaModel"]},
        {"num_experts": None, "max_position_embeddings": 1},
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    ],
)
def test_a_resave_keeps_the_shape(noise: dict[str, Any]) -> None:
    assert shape(**noise) == shape()


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": 2},
        {"num_attention_heads": 4},
        {"head_dim": 32},
        {"num_hidden_layers": 4},
        {"sliding_window": 4096},
        {"num_experts_per_tok": 2},
        {"model_type": "mistral"},
        {"quantization_config": {"quant_method": "gptq"}},
        {"text_config": {"model_type": "llama", "num_attention_heads": 8}},
    ],
)
def test_another_geometry_is_another_shape(change: dict[str, Any]) -> None:
    assert shape(**change) != shape()


@pytest.mark.parametrize(
    "tensors",
    [
        TENSORS[:1],
        [TENSORS[0], Tensor("c.weight", (4,), "F32")],
        [TENSORS[0], Tensor("b.weight", (2, 2), "F32")],
        [TENSORS[0], Tensor("b.weight", (4,), "BF16")],
    ],
)
def test_another_tensor_is_another_shape(tensors: list[Tensor]) -> None:
    assert digests.shape_digest(PRESETS["tiny-llama"], tensors) != shape()
    assert digests.random_weights_digest(1, tensors) != digests.random_weights_digest(1, TENSORS)


@pytest.mark.parametrize("name", TINY)
def test_a_model_that_transformers_saved_again_has_the_same_shape_and_weights(name: str, tmp_path: Path) -> None:
    import torch
    import transformers

    first = resolve(f"random:{name}", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(first.path, dtype="auto")
    model.save_pretrained(tmp_path / "same")
    again = resolve(str(tmp_path / "same"), tmp_path)
    assert again.shape == first.shape
    assert again.model_type == first.model_type
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    model.save_pretrained(tmp_path / "tuned")
    tuned = resolve(str(tmp_path / "tuned"), tmp_path)
    assert tuned.shape == first.shape
    assert tuned.weights != again.weights


def test_the_weights_digest_is_kept_by_size_and_time(checkpoint: Path, tmp_path: Path) -> None:
    before = digests.weights_digest(weight_files(checkpoint), tmp_path)
    file = checkpoint / headers.WEIGHTS
    status = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\x7f")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digests.weights_digest(weight_files(checkpoint), tmp_path) == before, (
        "kept: nothing that is looked at has changed"
    )
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    changed = digests.weights_digest(weight_files(checkpoint), tmp_path)
    assert changed != before
    assert digests.weights_digest(weight_files(checkpoint), tmp_path / "another cache") == changed


def test_a_damaged_entry_of_the_cache_is_computed_anew(checkpoint: Path, tmp_path: Path) -> None:
    before = digests.weights_digest(weight_files(checkpoint), tmp_path)
    (entry,) = (tmp_path / "digests").iterdir()
    entry.write_text("")
    assert digests.weights_digest(weight_files(checkpoint), tmp_path) == before


def test_a_blob_of_the_hubs_cache_is_not_read(checkpoint: Path, tmp_path: Path) -> None:
    """Its name is the SHA-256 of its content, and so agrees with a directory's."""
    import hashlib

    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    name = hashlib.sha256((checkpoint / headers.WEIGHTS).read_bytes()).hexdigest()
    (blobs / name).write_bytes(b"not read")
    (snapshot / headers.WEIGHTS).symlink_to(blobs / name)
    linked, own = (digests.weights_digest(weight_files(each), tmp_path) for each in (snapshot, checkpoint))
    assert linked == own


def test_headers_are_read_as_safetensors_writes_them(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"b": torch.zeros(3, 5, dtype=torch.bfloat16), "a": torch.zeros(7, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert read_tensors(tmp_path) == [Tensor("a", (7,), "U8"), Tensor("b", (3, 5), "BF16")]


def write(path: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_an_offset_is_counted_from_the_start_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": ENTRY}, b"01234567")
    (stored,) = read_header(tmp_path / "x")
    assert stored == StoredTensor(Tensor("a", (2,), "F32"), (tmp_path / "x").stat().st_size - 8)


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": ENTRY}, b"0123", "its header describes"),
        ({"a": ENTRY}, b"0123456789", "its header describes"),
        (b"{}{", b"", "no readable safetensors header"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"01234567", "no readable safetensors header"),
        ({"a": {**ENTRY, "dtype": "F31"}}, b"01234567", "unknown dtype 'F31'"),
        ({"a": {**ENTRY, "shape": [3]}}, b"01234567", "needs 12 bytes, its header gives it 8"),
    ],
)
def test_a_damaged_file_is_said_in_one_sentence(header: object, data: bytes, said: str, tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(LoadFailed) as caught:
        read_header(tmp_path / "x.safetensors")
    assert said in str(caught.value)
    assert str(tmp_path / "x.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file has 0"),
        (b"abc", "the file has 3"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is truncated or not a safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_is_said(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(LoadFailed, match=said):
        read_header(tmp_path / "x")


def test_a_truncated_file_names_both_sizes(checkpoint: Path) -> None:
    file = checkpoint / headers.WEIGHTS
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(size - 1000)
    with pytest.raises(LoadFailed, match=f"describes {size} bytes, the file has {size - 1000}"):
        read_tensors(checkpoint)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no model.safetensors and no model.safetensors.index.json, so it contains no weights"),
        ({"pytorch_model.bin": ""}, "cannot be read as tensors alone"),
        ({"model.fp16.safetensors": ""}, r"but model\.fp16\.safetensors: give a folder .* under their plain names"),
        ({"consolidated.00.pth": ""}, r"consolidated\.00\.pth: .* or load them in a loader of your own"),
        ({"a.gguf": "", "b.gguf": ""}, r"2 GGUF files; name one of them as the model: a\.gguf, b\.gguf"),
        ({"__0_0.distcp": "", "__1_0.distcp": ""}, r"but 2 parts of a distributed checkpoint \(__0_0\.distcp\): merge"),
        ({"pytorch_model_fsdp_0/__0_0.distcp": ""}, r"\(pytorch_model_fsdp_0/__0_0\.distcp\): merge them with acceler"),
        ({headers.INDEX: "{"}, "is not a readable index"),
        ({headers.INDEX: "{}"}, "is not a readable index"),
        ({headers.INDEX: '{"weight_map": {}}'}, "needs the objects weight_map and metadata"),
        (
            {headers.INDEX: '{"metadata": {}, "weight_map": {"a": "../m-1"}}'},
            "'../m-1', which is not a file name",
        ),
        (
            {headers.INDEX: '{"metadata": {}, "weight_map": {"a": "sub/m-1"}}'},
            "'sub/m-1', which is not a file name",
        ),
        (
            {headers.INDEX: '{"metadata": {}, "weight_map": {"a": "m-1", "b": "m-2"}}', "m-2": ""},
            "2 files of which 1 is missing: m-1",
        ),
    ],
)
def test_missing_weight_files_are_said(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(LoadFailed, match=said):
        read_tensors(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Tensors a and b in a file each."""
    write_weights(tmp_path, [headers.Tensor(name, (2, 2), "F32") for name in "ab"], shard_bytes=1)
    return tmp_path


def test_an_index_that_contradicts_its_files_is_said(sharded: Path) -> None:
    assert [tensor.name for tensor in read_tensors(sharded)] == ["a", "b"]
    index = json.loads((sharded / headers.INDEX).read_text())
    index["weight_map"] = {"a": index["weight_map"]["b"], "b": index["weight_map"]["a"]}
    (sharded / headers.INDEX).write_text(json.dumps(index))
    said = "index.json says that a is in model-00002-of-00002.safetensors, which does not contain it .and 1 more"
    with pytest.raises(LoadFailed, match=said):
        read_tensors(sharded)
    # A tensor that is looked up is found all the same, as the library does.
    assert CheckpointFiles(str(sharded)).where["a"].name == "model-00001-of-00002.safetensors"


def test_identifying_a_built_model_needs_no_torch(built: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from pathlib import Path\n"
        "from pytest_llmload.worker.checkpoints.resolve import resolve\n"
        f"cache = Path({str(built.parent.parent)!r})\n"
        "for spec in ('random:tiny-llama', str(cache / 'checkpoints' / sys.argv[1])):\n"
        "    print(resolve(spec, cache).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code, built.name], capture_output=True, text=True, check=True)
    expected = resolve(str(built), built.parent.parent).shape
    assert done.stdout.split() == [expected, expected]
