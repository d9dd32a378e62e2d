"""Loads as the worker reports them, for the unit tests: a 12.8B GPT-NeoX in nf4 on one H100."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pytest_llmload.baselines.model import Baseline
from pytest_llmload.baselines.record import record
from pytest_llmload.core.results import LOADED, LoadResult, ManifestRow, Numbers
from pytest_llmload.core.spec import LoadSpec

MIB = 1 << 20
GIB = 1 << 30
LAYERS = 40
HIDDEN = 5120
HOST = "NVIDIA H100 80GB HBM3/AMD EPYC 9654/560"

NF4 = LoadSpec(model="random:polyglot-ko-12.8b", name="polyglot-ko-12.8b", quant="nf4", double_quant=True)

ENVIRONMENT = {
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.1",
    "driver": "560.28.03",
    "gpu": "NVIDIA H100 80GB HBM3",
    "host": HOST,
    "malloc": "mmap_threshold=65536",
    "page_cache": "warm",
    "python": "3.11.7",
    "torch": "2.13.0+cu128",
    "transformers": "5.23.0",
}

METRICS = {
    "gpu.weights": 7_129_333_760,
    "gpu.0.weights": 7_129_333_760,
    "host.weights": 0,
    "weights.logical": 7_129_333_760,
    "gpu.other_tensors": 0,
    "host.other_tensors": 0,
    "gpu.load_allocated": 33_554_432_512,
    "gpu.load_allocations": 1_234,
    "gpu.settled": 7_130_382_336,
    "gpu.0.settled": 7_130_382_336,
    "gpu.load_peak": 9 * GIB,
    "gpu.generate_peak": 7_400_000_000,
    "gpu.forward_peak": 7_300_000_000,
    "gpu.reserved_peak": 10 * GIB,
    "gpu.process": 11 * GIB,
    "gpu.context": 500 * MIB,
    "host.peak": 900 * MIB,
    "host.settled": 300 * MIB,
    "host.file": 200 * MIB,
    "load": 12.31,
    "ttft": 0.0412,
    "per_token": 0.0251,
}


def linears(quant: str, per_module: int, *, cls: str = "Linear4bit", dtype: str = "uint8") -> list[ManifestRow]:
    """The four matrices of each layer, ``per_module`` bytes each."""
    names = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    return [
        ManifestRow(f"gpt_neox.layers.*.{name}", "0-39", cls, dtype, "cuda:0", quant, LAYERS, LAYERS * per_module)
        for name in names
    ]


def manifest(
    quant: str = "nf4 absmax=uint8 nested block=64 compute=bf16", per_module: int = 40 * MIB
) -> list[ManifestRow]:
    """Rows of the whole model."""
    return [
        ManifestRow("gpt_neox.embed_in", "", "Embedding", "bfloat16", "cuda:0", "", 1, 30080 * HIDDEN * 2),
        *linears(quant, per_module),
        ManifestRow("gpt_neox.layers.*.input_layernorm", "0-39", "LayerNorm", "bfloat16", "cuda:0", "", LAYERS, 819200),
        ManifestRow("gpt_neox.rotary_emb", "", "GPTNeoXRotaryEmbedding", "", "cuda:0", "", 1, 64),
        ManifestRow("embed_out", "", "Linear", "bfloat16", "cuda:0", "", 1, 30080 * HIDDEN * 2),
    ]


def numbers() -> Numbers:
    """A fingerprint of 4 positions x 4 ids."""
    return Numbers(
        logits=[0.1 * index - 0.7 for index in range(16)],
        logsumexp=[10.31, 10.42, 10.27, 10.55],
        margin=[0.2, 0.01, 0.4, 0.15],
        buffers={"gpt_neox.rotary_emb.inv_freq": [4.1731934, 1.2345678]},
    )


def load(spec: LoadSpec = NF4, metrics: dict[str, Any] | None = None, **changes: Any) -> LoadResult:
    """A load that worked; ``metrics`` are changed (None: not measured), other fields replaced."""
    figures = {**METRICS, **(metrics or {})}
    result = LoadResult(
        spec=spec.to_json(),
        outcome=LOADED,
        metrics={name: value for name, value in figures.items() if value is not None},
        samples={"load": [12.4, 12.31, 12.2], "ttft": [0.0412, 0.0413], "per_token": [0.0251, 0.0251]},
        numbers=numbers(),
        manifest=manifest(),
        environment=dict(ENVIRONMENT),
        digests={"shape": "5ha9e" * 12, "weights": "3e1f" * 16},
        whole_bytes=7_129_333_760,
    )
    return dataclasses.replace(result, **changes)


def baseline_of(previous: Baseline | None, results: Sequence[LoadResult], **options: Any) -> Baseline:
    """Return the baseline that ``record()`` stores when it is called with these arguments."""
    baseline = record(previous, results, **options).baseline
    assert baseline is not None
    return baseline
