"""Checkpoints that are quantised already: what their config says must be what is in the model."""

from __future__ import annotations

import functools
import importlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from loads import checkpoint, job, judged, quick
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pytest_llmload.core.job import Checkpoint
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.probes.manifest import manifest
from pytest_llmload.process.load_imports import import_all
from pytest_llmload.process.measurement import measure
from pytest_llmload.quantisation.compressed_tensors import CompressedTensors
from pytest_llmload.worker.checkpoints.quantisation_config import contradiction, read_format
from pytest_llmload.worker.checks.quantised_values import holds_codes
from pytest_llmload.worker.model.tensors import Inventory

SCHEMES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}
#: The configs of torchao.quantization, by what is asked for.
TORCHAO = {"torchao-int8": "Int8WeightOnlyConfig", "torchao-fp8": "Float8WeightOnlyConfig"}
TORCHAO["torchao-intx4"] = "IntxWeightOnlyConfig"
five = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 saves torchao pickled")
_FOLDER = tempfile.TemporaryDirectory(prefix="llmload-prequantised-")


@functools.cache
def saved(scheme: str) -> Checkpoint:
    """A checkpoint that bitsandbytes or torchao quantised and transformers saved."""
    path = Path(_FOLDER.name) / scheme
    config = transformers.BitsAndBytesConfig(**SCHEMES[scheme]) if scheme in SCHEMES else torchao_config(scheme)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint("tiny-llama").path, quantization_config=config, dtype="auto", device_map={"": "cpu"}
    )
    model.save_pretrained(path)
    return Checkpoint(str(path), "shape", "weights")


def torchao_config(scheme: str) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    bits = {"weight_dtype": torch.int4} if scheme == "torchao-intx4" else {}
    return transformers.TorchAoConfig(getattr(quantization, TORCHAO[scheme])(**bits))


def with_config(directory: Path, quantization: dict[str, Any], source: Checkpoint | None = None) -> Checkpoint:
    """A copy of a checkpoint whose config says that it is quantised."""
    shutil.copytree((source or checkpoint("tiny-llama")).path, directory, dirs_exist_ok=True)
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantization}))
    return Checkpoint(str(directory), "shape", "weights")


def message(result: LoadResult) -> str:
    assert result.outcome == "not_applied"
    (problem,) = result.problems
    assert problem.check == "quantised"
    return problem.message


@pytest.mark.parametrize(
    ("scheme", "row"),
    [
        ("nf4", "nf4 absmax=float32 block=64 compute=float32"),
        ("nf4-dq", "nf4 absmax=uint8 nested block=64 compute=bfloat16"),
        ("int8", "int8 scale=float32 threshold=6"),
    ],
)
def test_none_is_what_the_checkpoint_says(scheme: str, row: str) -> None:
    result = quick(saved(scheme))
    assert [problem.message for problem in result.problems] == []
    assert {found.quant for found in result.manifest if found.module.endswith("q_proj")} == {row}
    assert any("the checkpoint is quantised already: bitsandbytes" in note for note in result.notes)
    assert not [note for note in result.notes if "were not compared" in note]


@five
@pytest.mark.parametrize("scheme", TORCHAO)
def test_torchaos_tensors_are_read_from_the_file(scheme: str) -> None:
    """save_pretrained writes the tensors inside a subclass beside each other, under names of their own."""
    result = quick(saved(scheme))
    assert [problem.message for problem in result.problems] == []
    assert {found.quant.split(" ")[0] for found in result.manifest if found.module.endswith("q_proj")} == {scheme}
    assert not [note for note in result.notes if "were not compared" in note or "were not read" in note]
    said = scheme if scheme != "torchao-intx4" else "torchao IntxWeightOnlyConfig"
    assert any(f"the checkpoint is quantised already: {said}" in note or said in note for note in result.notes)


@pytest.mark.parametrize("scheme", ["nf4", pytest.param("torchao-int8", marks=five)])
def test_a_keyword_that_says_the_same_is_fine(scheme: str) -> None:
    assert quick(saved(scheme), quant=scheme).problems == []


def test_an_adapter_on_a_checkpoint_that_is_quantised_already() -> None:
    assert quick(saved("nf4"), adapter="random").problems == []


@pytest.mark.parametrize(("scheme", "library"), [("nf4", "bitsandbytes"), ("int8", "bitsandbytes"), (None, None)])
def test_the_files_quantiser_is_imported_before_the_load(
    scheme: str | None, library: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its imports are in no figure of the load, as those of a scheme that a test asks for."""
    asked = job(saved(scheme) if scheme else "tiny-llama")
    imported: list[str] = []
    real = importlib.import_module

    def noted(name: str, package: str | None = None) -> Any:
        imported.append(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", noted)
    import_all(asked, [])
    assert [name for name in ("bitsandbytes", "torchao.quantization") if name in imported] == (
        [library] if library else []
    )


@pytest.mark.parametrize("scheme", ["nf4-dq", "int8", pytest.param("torchao-int8", marks=five)])
def test_a_merge_into_a_checkpoint_that_is_quantised_already(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are not computed, since the file has no dense weights; that nothing was merged is seen all the same."""
    result = quick(saved(scheme), adapter="random", adapter_merged=True)
    assert [problem.message for problem in result.problems] == []
    assert any("12 merged weights were not compared" in note for note in result.notes)
    assert not [note for note in result.notes if "merging moved the logits" in note]
    monkeypatch.setattr(peft.PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    told = quick(saved(scheme), adapter="random", adapter_merged=True).problems
    assert [problem.message for problem in told] == ["the adapter is not merged into 12 of 12 modules"]


@pytest.mark.parametrize(
    ("scheme", "fields", "asked", "stored"),
    [
        ("int8", {"quant": "nf4"}, "nf4", "int8"),
        ("nf4", {"quant": "int8"}, "int8", "nf4"),
        ("nf4", {"quant": "nf4", "double_quant": True}, "nf4 with double quant", "nf4"),
        ("nf4-dq", {"quant": "nf4"}, "nf4", "nf4 with double quant"),
        (
            "nf4",
            {"quant": "nf4", "compute_dtype": "bf16"},
            "nf4 computed in bf16",
            "nf4 computed in fp32",
        ),
    ],
    ids=str,
)
def test_a_keyword_that_the_file_contradicts(scheme: str, fields: dict[str, Any], asked: str, stored: str) -> None:
    phases: list[str] = []
    result, loaded = measure(job(saved(scheme), **fields), phases.append)
    assert message(result).startswith(
        f"{asked} was requested, but {stored} is stored: the checkpoint is quantised already, and what its config.json "
    )
    assert loaded is None
    assert "load" not in phases, "known before anything is loaded"
    assert result.environment["transformers"] == transformers.__version__


def test_nf4_of_a_file_that_the_library_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config is there, but no library acts on it."""
    from transformers.quantizers.auto import AutoHfQuantizer

    monkeypatch.setattr(AutoHfQuantizer, "supports_quant_method", staticmethod(lambda config: False))
    files = with_config(tmp_path, read_quantization(saved("nf4")))
    assert "nothing was quantised to nf4: 21 weights" in message(judged(files))


def read_quantization(files: Checkpoint) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(files.path) / "config.json").read_text())["quantization_config"]
    return found


def flipped(weight: Any) -> None:
    weight.data = weight.data.flip(0)


def between_the_ends(weight: Any) -> None:
    """Change three quarters of the packed values, and neither the first nor the last of them."""
    codes = weight.qdata if hasattr(weight, "qdata") else weight.data
    quarter = codes.shape[0] // 8
    codes[quarter:-quarter].copy_(codes[quarter:-quarter].flip(0).clone())


def nested_scales(weight: Any) -> None:
    weight.quant_state.state2.absmax *= 1.2


def scales(weight: Any) -> None:
    weight.scale[-8:] *= 1.2


@pytest.mark.parametrize(
    ("scheme", "change"),
    [
        *(("nf4", flipped), ("nf4", between_the_ends), ("nf4-dq", nested_scales)),
        *(("int8", flipped), ("int8", between_the_ends)),
        *(pytest.param("torchao-int8", change, marks=five) for change in (between_the_ends, scales)),
        pytest.param("torchao-fp8", scales, marks=five),
    ],
)
def test_packed_values_must_be_the_files_own(
    scheme: str, change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = transformers.PreTrainedModel.from_pretrained.__func__

    def loading(cls: type, *args: Any, **kwargs: Any) -> Any:
        model, info = original(cls, *args, **kwargs)
        with torch.no_grad():
            change(model.model.layers[1].mlp.up_proj.weight)
        return model, info

    files = saved(scheme)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(loading))
    assert "a dequantised block of 1 of 21 weights is not the checkpoint's" in message(judged(files))


def test_a_file_holds_codes_also_where_they_are_packed_in_larger_integers(tmp_path: Path) -> None:
    dtypes = ("int32", "int8", "float8_e4m3fn", "bfloat16", "float32")
    save_file({name: torch.zeros(4, 4, dtype=getattr(torch, name)) for name in dtypes}, tmp_path / "a.safetensors")
    config = {"config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 8}}}}
    with safe_open(str(tmp_path / "a.safetensors"), "pt") as file:
        slices: dict[str, Any] = {name: file.get_slice(name) for name in dtypes}
        assert [name for name in dtypes if holds_codes(slices[name])] == ["int32", "int8", "float8_e4m3fn"]
        # compressed-tensors packs integers of 32 bits under a different name.
        plain = {name: {"weight": part, "weight_scale": torch.ones(4, 1)} for name, part in slices.items()}
        method = CompressedTensors()
        own = [name for name, tensors in plain.items() if method.in_file(tensors, "weight", config) is not None]
        assert own == ["int8", "float8_e4m3fn"]


# Methods of other tools


def test_a_method_that_the_library_does_not_know(tmp_path: Path) -> None:
    files = with_config(tmp_path, {"quant_method": "tomorrow", "bits": 3})
    assert (
        f"says 'tomorrow', which transformers {transformers.__version__} does not know: it skipped the quantisation: "
        "21 weights (13.50 MiB) are dense"
    ) in message(quick(files))
    # No library acts on it, so that a keyword is no contradiction.
    assert quick(files, quant="nf4").problems == []


def test_a_library_that_dequantises_without_being_asked(tmp_path: Path) -> None:
    """Both versions of transformers do this to MXFP4 where its kernels are missing, with a logged warning."""
    files = with_config(tmp_path, {"quant_method": "mxfp4"})
    assert "config.json says mxfp4, but nothing is quantised in the model: 21 weights" in message(judged(files))


def fp8(directory: Path) -> Checkpoint:
    """FP8 with one scale a block of 128 x 128, as DeepSeek's checkpoints have it."""
    files = with_config(directory, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = (-(-size // 128) for size in tensors[name].shape)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(rows, columns)
    save_file(tensors, file, {"format": "pt"})
    return files


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 refuses FP8 without a GPU")
def test_fp8_that_is_dequantised_on_a_cpu(tmp_path: Path) -> None:
    assert "config.json says fp8 block=128x128, but nothing is quantised" in message(judged(fp8(tmp_path)))


class Packed(torch.nn.Module):  # type: ignore[misc]
    """A layer as GPTQ's kernels keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(64, 512, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(4, 512, dtype=torch.float16))


def test_other_formats_are_told_in_the_manifest_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the kernels, which need a GPU; the files hold one layer dense, the others packed."""
    from transformers.quantizers.auto import AutoHfQuantizer

    from pytest_llmload.worker.checks import prequantised
    from pytest_llmload.worker.model.loaded import Loaded

    files = with_config(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 128})
    monkeypatch.setattr(AutoHfQuantizer, "supports_quant_method", staticmethod(lambda config: False))
    model = transformers.AutoModelForCausalLM.from_pretrained(files.path, dtype="auto")
    for layer in model.model.layers:
        layer.mlp.up_proj = Packed()
    found = read_format(files.path)
    assert found is not None
    rows = manifest(Inventory(model), found.description)
    assert {row.quant for row in rows if row.module.endswith("up_proj")} == {"gptq 4 bit group=128"}
    assert {row.quant for row in rows if not row.module.endswith("up_proj")} == {""}

    loaded = Loaded(job=job(files), model=model)
    assert list(prequantised.check(loaded, found)) == []
    assert "3 modules hold quantised weights, 18 weights" in loaded.notes[0]

    # The files hold a layer packed that is dense in the model.
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.gate_proj.weight"] = tensors["model.layers.0.mlp.gate_proj.weight"].to(torch.int8)
    save_file(tensors, file, {"format": "pt"})
    (problem,) = prequantised.check(Loaded(job=job(files), model=model), found)
    assert "gptq 4 bit group=128, but 1 weight (" in problem.message
    assert problem.names[0].startswith("model.layers.0.mlp.gate_proj.weight")


@pytest.mark.parametrize(
    ("config", "description", "skips"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
            "gptq 4 bit group=128 act-order",
            (),
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "modules_to_not_convert": ["x"]},
            "awq 4 bit group=64 gemm",
            ("x",),
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
            "fp8 block=128x128 activations=dynamic",
            (),
        ),
        ({"quant_method": "mxfp4", "modules_to_not_convert": None}, "mxfp4", ()),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 128}}},
                "ignore": ["lm_head"],
            },
            "compressed-tensors pack-quantized int4 group=128",
            ("lm_head",),
        ),
    ],
    ids=lambda value: value.get("quant_method", "") if isinstance(value, dict) else "",
)
def test_what_a_config_says(config: dict[str, Any], description: str, skips: tuple[str, ...], tmp_path: Path) -> None:
    found = read_format(with_config(tmp_path, config).path)
    assert found is not None
    assert (found.description, found.skips, found.scheme) == (description, skips, "")
    spec = LoadSpec(model="m", name="m", quant="nf4")
    assert contradiction(spec, found).startswith(f"nf4 was requested, but {description} is stored: ")
    assert contradiction(LoadSpec(model="m", name="m"), found) == ""


def test_a_checkpoint_that_says_nothing() -> None:
    assert read_format(checkpoint("tiny-llama").path) is None
