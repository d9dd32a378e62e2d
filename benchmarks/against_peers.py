"""Hold ``llmload plan`` and its peers against what models really take: errors in percent, as a table.

The peers ask the hub by name; here they get the same local files that a hub would give them. Truth is the bytes of the
distinct storages of the loaded model (four shapes, loaded on the CPU), or what a committed H100 baseline measured.

pip install 'hf-mem>=0.5.6' accelerate && python benchmarks/against_peers.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from accelerate.commands import estimate
from hf_mem.safetensors.metadata import parse_safetensors_metadata

from pytest_llmload.baselines.codec import loads
from pytest_llmload.core.job import Checkpoint, Device, Gpu, Job
from pytest_llmload.core.presets import PRESETS
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.process.job_strategies import plan
from pytest_llmload.worker.checkpoints.architecture import meta_model, stored_dtype, tensors_of
from pytest_llmload.worker.checkpoints.headers import Tensor
from pytest_llmload.worker.checkpoints.resolve import resolve
from pytest_llmload.worker.checkpoints.weights import read_tensors
from pytest_llmload.worker.model.tensors import Inventory

ROOT = Path(__file__).parents[1]
GPU = Gpu("GPU-0", "H100", 85_029_158_912, (9, 0))
#: accelerate's names of what a load is asked for.
DTYPES = {"none": "float16", "int8": "int8", "nf4": "int4"}
VISION: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "dtype": "bfloat16",
    "image_token_index": 1000,
    "text_config": {key: value for key, value in PRESETS["tiny-llama"].items() if key != "architectures"},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "image_size": 56, "patch_size": 14, "projection_dim": 256,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One model, one way of loading it, and what that took."""

    kind: str
    name: str
    quant: str
    directory: Path
    #: As the files have them, also where the files were never written.
    tensors: list[Tensor]
    truth: float
    metric: str


def measured(directory: Path, cls: Any, quant: str) -> float:
    """Bytes of the distinct storages of a loaded model, its quantisation states with them."""
    options: dict[str, Any] = {"dtype": "auto"}
    if quant != "none":
        wanted = {"load_in_8bit": True} if quant == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": quant}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**wanted)
    model = cls.from_pretrained(directory, device_map={"": "cpu"}, **options)
    return float(sum(Inventory(model).storages().values()))


def on_cpu(folder: Path) -> Iterator[Case]:
    """Dense, mixture of experts, multimodal and pre-quantised, small enough to load here."""
    causal = transformers.AutoModelForCausalLM
    dense, experts = (Path(resolve(f"random:{name}", folder).path) for name in ("tiny-llama", "tiny-mixtral"))
    vision = folder / "vision"
    vision.mkdir()
    model = transformers.LlavaForConditionalGeneration(transformers.AutoConfig.for_model(**VISION)).to(torch.bfloat16)
    model.save_pretrained(vision)
    packed = folder / "packed"
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    causal.from_pretrained(dense, quantization_config=config, device_map={"": "cpu"}).save_pretrained(packed)
    for kind, name, path, cls, quants in (
        ("dense", "small Llama", dense, causal, ("none", "int8", "nf4")),
        ("mixture of experts", "small Mixtral", experts, causal, ("none", "nf4")),
        ("multimodal", "small LLaVA", vision, transformers.LlavaForConditionalGeneration, ("none", "nf4")),
        ("pre-quantised", "small Llama, nf4 in its files", packed, causal, ("none",)),
    ):
        for quant in quants:
            truth = measured(path, cls, quant)
            yield Case(kind, name, quant, path, read_tensors(path), truth, "weights.logical")


def on_h100(folder: Path) -> Iterator[Case]:
    """What committed baselines measured on a GPU: settled memory."""
    for name in ("polyglot-ko-12.8b", "polyglot-ko-5.8b", "llama-7b"):
        directory = folder / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(PRESETS[name]))
        tensors = tensors_of(meta_model(directory), stored_dtype(PRESETS[name]))
        for path in sorted((ROOT / "baselines" / name / "nvidia-h100-80gb-hbm3").glob("*.json")):
            baseline = loads(path.read_text(), str(path))
            quant = str(baseline.spec.get("quant", "none"))
            if set(baseline.spec) <= {"quant", "dtype"} and quant in DTYPES and baseline.spec.get("dtype") != "bf16":
                yield Case("dense", name, quant, directory, tensors, baseline.memory["gpu.settled"], "gpu.settled")


def planned(case: Case) -> float:
    """Our prediction."""
    on_gpu = case.metric.startswith("gpu")
    device = Device("cuda", "", (GPU,)) if on_gpu else Device("cpu", "")
    spec = LoadSpec(model="m", name="m", quant=case.quant, gpu_count=int(on_gpu))
    return plan(Job(spec, device, Checkpoint(str(case.directory), "", "")))[case.metric]


def accelerate(case: Case) -> float:
    """``accelerate estimate-memory``, with a hub that answers for the local directory."""
    config = json.loads((case.directory / "config.json").read_text())
    info = SimpleNamespace(config=config, library_name="transformers")
    asked = argparse.Namespace(
        model_name=str(case.directory),
        library_name="transformers",
        trust_remote_code=False,
        dtypes=[DTYPES[case.quant]],
    )
    hub = mock.patch.object(estimate, "model_info", return_value=info)
    with hub, contextlib.redirect_stdout(io.StringIO()):
        return float(estimate.gather_data(asked)[0][2])


def hf_mem(case: Case) -> float:
    """``hf-mem``: the bytes of the tensors in the files; it takes no quantisation that happens while loading."""
    header = {tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape)} for tensor in case.tensors}
    return float(parse_safetensors_metadata({"Transformer": header}).bytes_count)


def error(predict: Any, case: Case) -> str:
    """The prediction's error in percent, or why there is none."""
    try:
        text = f"{100 * (predict(case) / case.truth - 1):+.2f} %"
        return "0.00 %" if text in ("+0.00 %", "-0.00 %") else text
    except Exception as failure:  # noqa: BLE001 - a peer may fail in any way, which is its result
        return f"fails: {type(failure).__name__}"


def main() -> None:
    """Print the table as it stands in docs/commands.md."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("| kind | model | loaded as | truth | `llmload plan` | `accelerate estimate-memory` | `hf-mem` |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as base:
        for case in (*on_cpu(Path(base)), *on_h100(Path(base))):
            errors = " | ".join(error(predict, case) for predict in (planned, accelerate, hf_mem))
            where = "H100" if case.metric.startswith("gpu") else "CPU"
            asked = "as stored" if case.quant == "none" else case.quant
            print(f"| {case.kind} | {case.name} | {asked} | {case.truth / 2**20:,.2f} MiB, {where} | {errors} |")


if __name__ == "__main__":
    main()
