"""Formats beside bitsandbytes, with the real packages: true bytes, named, compared, and judged as they serve."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import format_files
import gptq_stand_in
import numpy
import pytest
import torch
import transformers
from loads import checkpoint, job, judged, load, quick
from safetensors import safe_open

from pytest_llmload.core.environment_entries import ENTRIES
from pytest_llmload.core.job import MEMORY, Checkpoint, Device, Gpu
from pytest_llmload.core.results import LoadResult
from pytest_llmload.process.job_strategies import plan
from pytest_llmload.process.model_changes import fingerprint
from pytest_llmload.quantisation import Stored
from pytest_llmload.quantisation.awq import Awq
from pytest_llmload.quantisation.fp8 import FineGrainedFp8
from pytest_llmload.quantisation.gptq import Gptq
from pytest_llmload.quantisation.hqq import Hqq
from pytest_llmload.quantisation.mxfp4 import Mxfp4
from pytest_llmload.quantisation.stored import stored_weights
from pytest_llmload.quantisation.torchao import TorchAO

TINY = "tiny-llama"


def storages(model: Any) -> int:
    """Bytes of the distinct storages of a model's parameters and buffers, subclasses flattened: an independent walk."""
    found: dict[int, int] = {}

    def visit(tensor: Any) -> None:
        if hasattr(type(tensor), "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                visit(getattr(tensor, name))
        else:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()

    # HQQ keeps scales and zero points in a dict of the module.
    states = [value for module in model.modules() for value in (vars(module).get("meta") or {}).values()]
    for tensor in (*model.parameters(), *model.buffers(), *(each for each in states if isinstance(each, torch.Tensor))):
        visit(tensor)
    found.pop(0, None)
    return sum(found.values())


def quants(result: LoadResult) -> set[str]:
    return {row.quant for row in result.manifest if row.module.endswith("q_proj")}


def messages(result: LoadResult) -> list[str]:
    return [problem.message for problem in result.problems]


@pytest.mark.parametrize(
    ("scheme", "described", "class_name"),
    [
        ("torchao-int8", "torchao-int8 scale=float32 group=512", "Int8Tensor"),
        ("torchao-int8-dynamic", "torchao-int8-dynamic scale=float32 group=512", "Int8Tensor"),
        ("torchao-fp8", "torchao-fp8 scale=float32 group=512", "Float8Tensor"),
        ("quanto-int8", "quanto-int8 scale=bfloat16 group=512", "WeightQBytesTensor"),
        ("quanto-int4", "quanto-int4 scale=bfloat16 group=128", "TinyGemmWeightQBitsTensor"),
        ("quanto-fp8", "quanto-fp8 scale=bfloat16 group=512", "WeightQBytesTensor"),
    ],
)
def test_quantised_while_loading(scheme: str, described: str, class_name: str) -> None:
    result, loaded = load(TINY, quant=scheme, figures=(MEMORY,))
    assert messages(result) == []
    assert result.faults == []
    weight = loaded.model.model.layers[0].self_attn.q_proj.weight
    assert type(weight).__name__ == class_name
    assert quants(result) == {described}
    # quanto's own scales of activations belong to the model too.
    assert result.metrics["host.weights"] == storages(loaded.model)
    # Not the dense sizes: a load that fits would be skipped. quanto's scales of activations are planned in 16 bit.
    planned = plan(job(TINY, quant=scheme))["host.weights"]
    assert planned == pytest.approx(result.metrics["host.weights"], rel=0 if "torchao" in scheme else 1e-4)
    # What a test may change is seen, whatever is inside a subclass.
    assert fingerprint(loaded.model) == fingerprint(loaded.model)


def test_a_config_of_the_users_is_planned_by_the_method_that_it_belongs_to() -> None:
    config = plan(job(TINY, quant="config", quant_config="own_quantisers:quanto_config"))
    assert config == plan(job(TINY, quant="quanto-int8"))
    assert config["host.weights"] < 0.6 * plan(job(TINY))["host.weights"]


@pytest.mark.parametrize("fields", [{"quant": "config", "quant_config": "own_quantisers:intx_int4"}, {"quant": "hqq"}])
def test_nothing_is_planned_of_what_is_not_known(fields: dict[str, Any]) -> None:
    """torchao's other types, of which the method does not say the bytes; and what the libraries cannot do."""
    assert plan(job(TINY, **fields)) == {}


def test_fine_grained_fp8_is_planned_for_a_gpu(tmp_path: Path) -> None:
    gpu = Gpu("GPU-0", "NVIDIA H100 80GB HBM3", 80 << 30, (9, 0))
    dense, small = (
        plan(replace(job(TINY, quant=quant, gpu_count=1), device=Device("cuda", "nvidia-h100", (gpu,))))
        for quant in ("none", "fp8")
    )
    # 21 matrices, 13.5 MiB in bf16: half of that, and a float32 scale for each 128 x 128 values.
    elements = 13.5 * (1 << 20) / 2
    assert dense["gpu.weights"] - small["gpu.weights"] == elements - elements / 128**2 * 4


@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        ("torchao-int8", "torchao_int8"),
        ("quanto-int4", "quanto_int4"),
        ("quanto-int8", "quanto_int8"),
        ("hqq", "hqq"),
    ],
)
def test_a_loader_that_quantises_is_judged_the_same(scheme: str, target: str) -> None:
    target = f"own_quantisers:{target}"
    result, loaded = load(TINY, strategy="loader", target=target, quant=scheme, figures=(MEMORY,))
    assert messages(result) == []
    assert {text.split()[0] for text in quants(result)} == {scheme}
    assert result.metrics["host.weights"] == storages(loaded.model)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, set()),
        ({"quant": "torchao-int8"}, {"torchao"}),
        ({"strategy": "loader", "target": "own_quantisers:quanto_int8"}, {"optimum.quanto"}),
        ({"strategy": "loader", "target": "own_quantisers:torchao_int8"}, {"torchao"}),
    ],
    ids=["none", "asked for", "quanto by a loader", "torchao by a loader"],
)
def test_a_quantisers_version_is_an_entry_of_its_own_loads(fields: dict[str, Any], names: set[str]) -> None:
    """A loader leaves no word about it in the model's config."""
    found = quick(TINY, **fields).environment
    assert set(found) - set(ENTRIES) == names


def test_a_loader_of_another_scheme() -> None:
    result = quick(TINY, strategy="loader", target="own_quantisers:quanto_int8", quant="torchao-int8")
    assert messages(result) == ["torchao-int8 was requested, but quanto-int8 is stored (21 of 21 weights)"]


def test_four_bits_that_take_a_byte_each_are_told() -> None:
    result = quick(TINY, quant="config", quant_config="own_quantisers:intx_int4")
    assert messages(result) == []
    assert quants(result) == {"torchao-intx4 scale=bfloat16 group=64 held=8bit"}
    assert "21 weights of torchao-intx4 hold their 4 bits an element in 8 bits of memory" in result.notes


def test_a_config_that_quantises_nothing() -> None:
    (text,) = messages(quick(TINY, quant="config", quant_config="own_quantisers:nothing"))
    assert text == "own_quantisers:nothing was requested, but nothing is quantised: 21 weights (13.50 MiB) are dense"


def test_hqq_says_why_it_cannot_be() -> None:
    (text,) = messages(quick(TINY, quant="hqq"))
    assert "has HqqConfig, but no operation that quantises with it" in text


def test_fp8_says_why_it_cannot_be_on_a_cpu() -> None:
    with pytest.raises(NotImplementedError, match="transformers quantises to FP8 on a GPU only"):
        FineGrainedFp8().config(job(TINY, quant="fp8"), "fp8", ())


# Values


@pytest.mark.parametrize(
    ("scheme", "factor"),
    [("torchao-int8", 0.9), ("quanto-int8", 0.9), ("quanto-fp8", 0.9), ("nf4", 0.9), ("int8", 0.9)],
)
def test_scales_that_clip_by_ten_percent(scheme: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the largest error of some types, and seen without a baseline."""
    import transformers

    original = transformers.PreTrainedModel.from_pretrained.__func__

    def loading(cls: type, *args: Any, **kwargs: Any) -> Any:
        model, info = original(cls, *args, **kwargs)
        weight = model.model.layers[1].mlp.up_proj.weight
        state = stored_weights(model.model.layers[1].mlp.up_proj)[0]
        with torch.no_grad():
            state.scales.mul_(factor)  # type: ignore[attr-defined]
        assert weight is not None
        return model, info

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(loading))
    (problem,) = judged(TINY, quant=scheme).problems
    assert problem.names[0].startswith("model.layers.1.mlp.up_proj.weight")
    assert "not the checkpoint's" in problem.message or "quantised twice, scaled or clipped" in problem.message


def test_nf4_of_what_was_fp4_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised twice: each value is within nf4's largest error of the original, or nearly so."""
    import bitsandbytes
    import transformers

    original = transformers.PreTrainedModel.from_pretrained.__func__

    def loading(cls: type, *args: Any, **kwargs: Any) -> Any:
        model, info = original(cls, *args, **kwargs)
        module = model.model.layers[1].mlp.up_proj
        functional = bitsandbytes.functional
        dense = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        coarse = functional.dequantize_4bit(*functional.quantize_4bit(dense, quant_type="fp4"))
        packed, state = functional.quantize_4bit(coarse, quant_type="nf4", blocksize=64)
        module.weight.data.copy_(packed)
        module.weight.quant_state.absmax.copy_(state.absmax)
        return model, info

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(loading))
    (problem,) = judged(TINY, quant="nf4").problems
    assert problem.names[0].startswith("model.layers.1.mlp.up_proj.weight")


# Checkpoints of other tools


def made(make: Callable[[Path, Path], Path], directory: Path) -> Checkpoint:
    return Checkpoint(str(make(Path(checkpoint(TINY).path), directory)), "shape", "weights")


def test_the_package_of_a_stored_format_is_an_entry_of_the_environment(tmp_path: Path) -> None:
    """No marker names the method: the checkpoint does, and a different release may load it differently."""
    stored = quick(made(format_files.compressed_tensors, tmp_path / "ct"))
    assert stored.environment["compressed_tensors"] == importlib.metadata.version("compressed-tensors")
    dense = quick(TINY)
    assert "compressed_tensors" not in dense.environment


def test_compressed_tensors_that_go_dense_in_the_first_forward(tmp_path: Path) -> None:
    result = quick(made(format_files.compressed_tensors, tmp_path / "ct"))
    assert quants(result) == {"compressed-tensors-int4 scale=bfloat16 group=64"}
    (text,) = messages(result)
    assert text.startswith("the first forward made 21 of 21 quantised weights dense: ")
    assert text.endswith("and 13.50 MiB while it serves: compressed-tensors decompressed it")


def test_fp8_that_is_made_dense_is_told_once(tmp_path: Path) -> None:
    (text,) = messages(quick(made(format_files.fp8, tmp_path / "fp8")))
    assert "config.json says fp8 block=128x128 activations=dynamic, but nothing is quantised" in text
    assert text.endswith("21 weights (13.50 MiB) are dense")


def test_mxfp4_that_is_made_dense_names_what_the_files_hold_packed(tmp_path: Path) -> None:
    """Attention and embeddings were dense in the file too, and are not told."""
    files = Checkpoint(str(format_files.gpt_oss(tmp_path / "oss")), "shape", "weights")
    (text,) = messages(quick(files))
    assert text == (
        "the checkpoint's config.json says mxfp4, but nothing is quantised in the model: 4 weights (3.00 MiB) are dense"
    )


class Slices:
    """The tensors of one module of a checkpoint's file, as lazy slices."""

    def __init__(self, directory: Path, module: str) -> None:
        (file,) = directory.glob("*.safetensors")
        opened: Any = safe_open(str(file), "pt")
        self._file = opened
        self.tensors: dict[str, Any] = {
            name.removeprefix(f"{module}."): opened.get_slice(name)
            for name in list(opened.keys())
            if name.startswith(f"{module}.")
        }


def rows(weight: Stored, first: int, last: int) -> Any:
    columns = weight.shape[-1]
    return weight.dequantised(first * columns, last * columns).reshape(last - first, columns)


@pytest.mark.parametrize(
    ("make", "method"), [(format_files.gptq, Gptq()), (format_files.awq, Awq())], ids=["gptq", "awq"]
)
def test_packed_integers_of_a_file_are_the_dense_weight(make: Any, method: Any, tmp_path: Path) -> None:
    module = "model.layers.0.mlp.up_proj"
    directory = make(Path(checkpoint(TINY).path), tmp_path / "packed")
    config = {"bits": 4, "checkpoint_format": "gptq"}
    weight = method.in_file(Slices(directory, module).tensors, "weight", config)
    original = Slices(Path(checkpoint(TINY).path), module).tensors["weight"][:].float()
    assert weight.shape == tuple(original.shape)
    # Half a step of 4 bit, of the range of the group, and the rounding of the scale to 16 bit.
    step = original.abs().max() * 2 / 15
    for first, last in ((0, 3), (13, 17), (509, 512)):
        assert float((rows(weight, first, last) - original[first:last]).abs().max()) <= float(step) / 2 * 1.02


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 asks for other functions")
def test_a_gptq_checkpoint_loads_and_its_zero_points_are_judged_as_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is in buffers; of version 1, the library changes the zero points after it has read them."""
    gptq_stand_in.install(monkeypatch)
    files = Checkpoint(str(format_files.gptq(Path(checkpoint(TINY).path), tmp_path / "packed")), "shape", "weights")
    result = quick(files)
    assert ([problem.message for problem in result.problems], result.faults) == ([], [])
    assert {row.quant for row in result.manifest if row.cls == "TorchAtenLinear"} == {
        "gptq-int4 scale=float16 group=64"
    }
    monkeypatch.setattr(gptq_stand_in.Quantizer, "step", 0)
    (problem,) = quick(files).problems
    assert problem.check == "quantised"
    assert "_proj" in problem.names[0]


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 asks for other functions")
def test_an_awq_checkpoint_loads_and_its_codes_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gptq_stand_in.install_awq(monkeypatch)
    files = Checkpoint(str(format_files.awq(Path(checkpoint(TINY).path), tmp_path / "packed")), "shape", "weights")
    result, loaded = load(files, figures=(MEMORY,))
    assert ([problem.message for problem in result.problems], result.faults) == ([], [])
    assert quants(result) == {"awq-int4 scale=float16 group=64"}
    assert result.metrics["host.weights"] == storages(loaded.model)
    # The model computes what its dense original does, but for the rounding to 4 bit.
    dense = quick(TINY).numbers.logits
    assert numpy.corrcoef(dense, result.numbers.logits)[0, 1] > 0.9

    def shifted(model: Any, **settings: Any) -> None:
        model.model.layers[1].mlp.up_proj.qzeros += 0x11111111

    monkeypatch.setattr(sys.modules["gptqmodel.utils.model"], "hf_gptqmodel_post_init", shifted)
    (problem,) = quick(files).problems
    assert problem.names[0].startswith("model.layers.1.mlp.up_proj")


def test_zero_points_of_version_two_are_not_one_lower(tmp_path: Path) -> None:
    tensors = Slices(format_files.gptq(Path(checkpoint(TINY).path), tmp_path / "packed"), "model.layers.0.mlp.up_proj")
    first, second = (
        Gptq().in_file(tensors.tensors, "weight", {"bits": 4, "checkpoint_format": version})
        for version in ("gptq", "gptq_v2")
    )
    assert first is not None
    assert second is not None
    difference = rows(second, 0, 1) - rows(first, 0, 1)
    scales = tensors.tensors["scales"][:, 0].float().repeat_interleave(format_files.GROUP)
    torch.testing.assert_close(difference.reshape(-1), scales)


def test_mxfp4_of_a_file_is_what_the_library_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = Slices(format_files.gpt_oss(tmp_path / "oss"), "model.layers.0.mlp.experts").tensors
    weight = Mxfp4().in_file(tensors, "gate_up_proj", {})
    assert weight is not None
    expected = convert_moe_packed_tensors(
        tensors["gate_up_proj_blocks"][:], tensors["gate_up_proj_scales"][:], dtype=torch.float32
    )
    assert weight.shape == tuple(expected.shape)
    torch.testing.assert_close(weight.dequantised(1000, 3000), expected.reshape(-1)[1000:3000])


# Modules that a library makes


@pytest.fixture(scope="module")
def dense() -> Any:
    torch.manual_seed(0)
    return torch.nn.Linear(256, 192, bias=False, dtype=torch.bfloat16)


def test_hqq_dequantises_as_the_library(dense: Any) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for bits in (8, 4, 2):
        config = BaseQuantizeConfig(nbits=bits, group_size=64)
        module = HQQLinear(dense, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        (weight,) = stored_weights(module)
        assert weight.describe().startswith("hqq scale=" if bits == 4 else f"hqq-int{bits} scale=")
        assert weight.packed_bytes * 8 == weight.elements * bits
        torch.testing.assert_close(rows(weight, 0, 192), module.dequantize().float())


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("group", [64, 32])
def test_hqq_is_planned_in_the_bytes_that_it_takes(bits: int, group: int, dense: Any) -> None:
    from hqq.core.quantize import HQQLinear
    from transformers import HqqConfig

    config = HqqConfig(nbits=bits, group_size=group, axis=1)
    module = HQQLinear(dense, config.quant_config, compute_dtype=torch.bfloat16, device="cpu", del_orig=False)
    tensors = [module.W_q, *(value for value in module.meta.values() if isinstance(value, torch.Tensor))]
    held = torch.nn.Module()
    for index, tensor in enumerate(tensors):
        held.register_buffer(str(index), tensor.detach())
    planned = Hqq().planned(dense, dense.weight, replaced=True, config=config)
    assert planned is not None
    assert sum(planned.values()) == storages(held)


@pytest.mark.parametrize("group", [128, 32])
def test_torchao_int4_is_planned_in_the_bytes_that_it_takes(group: int, dense: Any) -> None:
    """Its kernels need a GPU; the tensor is put together by hand, in the shapes that its class documents."""
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4Tensor
    from transformers import TorchAoConfig

    outputs, inputs = dense.weight.shape
    both = [torch.zeros(inputs // group, outputs, dtype=torch.bfloat16) for _ in range(2)]
    packed = torch.zeros(outputs, inputs // 2, dtype=torch.int8)
    held = torch.nn.Module()
    tensor = Int4Tensor(packed, *both, [1, group], dense.weight.shape)
    held.weight = torch.nn.Parameter(tensor, requires_grad=False)
    config = TorchAoConfig(Int4WeightOnlyConfig(group_size=group))
    planned = TorchAO().planned(dense, dense.weight, replaced=True, config=config)
    assert planned is not None
    assert sum(planned.values()) == storages(held)
    (weight,) = TorchAO().read(held)
    assert (weight.scheme, weight.shape, weight.packed_bytes) == ("torchao-int4", (outputs, inputs), packed.nbytes)


def test_quanto_int2_dequantises_as_the_library(dense: Any) -> None:
    from optimum.quanto import WeightQBitsTensor, qint2
    from optimum.quanto.tensor.optimizers import MaxOptimizer

    scale, shift = MaxOptimizer()(dense.weight.data, qtype=qint2, axis=0, group_size=64)
    packed = WeightQBitsTensor.quantize(dense.weight.data, qint2, 0, 64, scale, shift)
    module = torch.nn.Linear(256, 192, bias=False)
    module.weight = torch.nn.Parameter(packed, requires_grad=False)
    (weight,) = stored_weights(module)
    assert weight.describe() == "quanto-int2 scale=bfloat16 group=64"
    expected = weight.rounded(dense.weight.float().reshape(-1))
    assert expected is None
    assert float((rows(weight, 0, 192) - dense.weight.float()).abs().max()) <= float(scale.max()) * 0.55


# Shapes


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_weight_whose_shape_is_not_the_configs(scheme: str, tmp_path: Path) -> None:
    """The library loads it in the file's shape, and says nothing."""

    def change(tensors: dict[str, Any]) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = tensors[name][:256]

    files = format_files.copied(Path(checkpoint(TINY).path), tmp_path / "odd", {}, change)
    result = judged(Checkpoint(str(files), "shape", "weights"), quant=scheme)
    assert result.outcome == "not_applied"
    # Whether the forward runs is the kernel's affair: one on the CPU does not look at the shapes.
    (problem,) = [problem for problem in result.problems if problem.check == "quantised"]
    assert "256 x 512 in the model, 512 x 512 by its config" in problem.message
    assert problem.names[0].startswith("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_config_that_gives_other_sizes_than_the_file_has(scheme: str, tmp_path: Path) -> None:
    """The model runs, in sizes that its config does not say; a dense load is refused by the library."""
    files = format_files.copied(Path(checkpoint(TINY).path), tmp_path / "odd", {}, lambda tensors: None)
    config = json.loads((files / "config.json").read_text())
    (files / "config.json").write_text(json.dumps({**config, "intermediate_size": 768}))
    result = quick(Checkpoint(str(files), "shape", "weights"), quant=scheme)
    assert result.outcome == "not_applied"
    assert messages(result) == [
        "6 quantised weights do not have the shape that the config gives them: 1024 x 512 in the model, 768 x 512 by "
        "its config",
        "3 quantised weights do not have the shape that the config gives them: 512 x 1024 in the model, 512 x 768 by "
        "its config",
    ]


def test_an_output_head_that_is_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_llmload.quantisation.bitsandbytes import BitsAndBytes

    config = BitsAndBytes.config
    monkeypatch.setattr(
        BitsAndBytes, "config", lambda self, job, scheme, skips: config(self, job, scheme, ("nothing",))
    )
    result = quick("tiny-gpt-neox", quant="nf4")
    assert any("is dense by default is quantised: output head" in text for text in messages(result))
