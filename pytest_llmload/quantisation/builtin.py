"""The built-in methods, in the order of the documentation. Importing them imports no torch."""

from __future__ import annotations

from pytest_llmload.quantisation.awq import Awq
from pytest_llmload.quantisation.base import Method
from pytest_llmload.quantisation.bitsandbytes import BitsAndBytes
from pytest_llmload.quantisation.compressed_tensors import CompressedTensors
from pytest_llmload.quantisation.fp8 import FineGrainedFp8
from pytest_llmload.quantisation.gguf import Gguf
from pytest_llmload.quantisation.gptq import Gptq
from pytest_llmload.quantisation.hqq import Hqq
from pytest_llmload.quantisation.mxfp4 import Mxfp4
from pytest_llmload.quantisation.quanto import Quanto
from pytest_llmload.quantisation.torchao import TorchAO

BUILTIN: tuple[type[Method], ...] = (
    BitsAndBytes,
    TorchAO,
    Quanto,
    Hqq,
    CompressedTensors,
    Gptq,
    Awq,
    FineGrainedFp8,
    Mxfp4,
    Gguf,
)
