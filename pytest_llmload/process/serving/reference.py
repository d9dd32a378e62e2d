"""Compare a server's answer with that of the same model, loaded here with the settings of ``transformers serve``."""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass
from typing import Any

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import Problem
from pytest_llmload.core.spec import AS_STORED, SINGLE, LoadSpec
from pytest_llmload.core.units import format_bytes
from pytest_llmload.process import job_strategies
from pytest_llmload.process.job_strategies import plan as planned
from pytest_llmload.process.load_imports import import_all
from pytest_llmload.quantisation.registry import schemes
from pytest_llmload.system.proc import available

#: The most bytes of a dense model that is loaded a second time, while the server runs.
_LARGEST = 4 << 30
#: Stands for bytes that are not yet a whole character; a stream holds them back, decoding the whole text does not.
_BROKEN = "\ufffd"
#: The most characters of a text that are quoted.
_QUOTED = 60


@dataclass(frozen=True)
class _Said:
    text: str
    #: True if a different order of sums cannot change a token.
    exact: bool


def check(job: Job, tokenizer: Any, prompt: str, text: str) -> tuple[list[Problem], str]:
    """Compare a server's answer to the workload with the model's own; return problems, and a note if it is undecided.

    In fp32 the texts must be equal. Otherwise a different text proves nothing, unless it is that of the dense model and
    a quantised model was requested.
    """
    spec = job.spec
    own = dataclasses.replace(spec, strategy=SINGLE, options=(), **_served_fields(spec.quant))
    dense = dataclasses.replace(own, quant=AS_STORED, double_quant=False)
    if why := _too_large(dataclasses.replace(job, spec=dense)):
        return [], f"the text was not compared with that of the model loaded here: {why}"
    said = _say(job, own, tokenizer, prompt)
    if _bare(said.text) == _bare(text):
        return [], ""
    both = f"the server answers {text[:_QUOTED]!r}, the same model loaded here {said.text[:_QUOTED]!r}"
    if said.exact:
        return [Problem("output", f"{both}, in fp32")], ""
    if spec.quant != AS_STORED and _bare(_say(job, dense, tokenizer, prompt).text) == _bare(text):
        return [Problem("quantised", f"the server answers as the dense model does, not as the one in {spec.quant}")], ""
    return [], f"{both}; in 16 bit or quantised this difference proves nothing"


def _served_fields(quant: str) -> dict[str, Any]:
    """Return the server's settings for a scheme, as fields of a LoadSpec."""
    served = schemes()[quant][0].served if quant != AS_STORED else None
    return dict(served.fields) if served is not None else {}


def _too_large(job: Job) -> str:
    """Return why a dense model is not loaded while the server runs; empty if it is."""
    size = planned(job)["weights.logical"]
    if size > _LARGEST:
        return f"it has {format_bytes(size)} of weights"
    if job.device.kind == "cuda":
        import torch

        free = torch.cuda.mem_get_info(0)[0]
        if free < 2 * size:
            return f"the server leaves {format_bytes(free)} of the GPU"
    # Memory for the files that are read, and for the weights made of them.
    elif available() < 3 * size:
        return f"the server leaves {format_bytes(available())} of memory"
    return ""


def _say(job: Job, spec: LoadSpec, tokenizer: Any, prompt: str) -> _Said:
    """Return the model's own continuation, with the settings that the server was given."""
    import torch
    from transformers import GenerationConfig

    job = dataclasses.replace(job, spec=spec)
    served_by = job_strategies.strategies(job)
    import_all(job, served_by)
    model = served_by[0].load(job, job_strategies.load_kwargs(job, served_by)).model
    exact = spec.quant == AS_STORED and all(
        p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point()
    )
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    count = spec.workload.new_tokens
    settings = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False)
    with torch.no_grad():
        ids = model.generate(**inputs, generation_config=settings)[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    del model
    gc.collect()
    return _Said(text, exact)


def _bare(text: str) -> str:
    return text.replace(_BROKEN, "")
