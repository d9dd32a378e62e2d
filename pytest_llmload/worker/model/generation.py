"""Fixed tokens, the first forward, and generating: the same in every load."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pytest_llmload.core.job import Job
from pytest_llmload.core.spec import Workload
from pytest_llmload.quantisation.registry import methods
from pytest_llmload.worker.checkpoints.digests import read_config
from pytest_llmload.worker.model.inputs import (
    embedded_tokens,
    forward_inputs,
    generate_inputs,
    generating_module,
    input_device,
    named_inputs,
    required_by_generate,
    vocabulary,
)
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.logits_processor import LogitsProcessor
from pytest_llmload.worker.model.prompts import Prompt, token_ids

#: Constants of a 32-bit linear congruential generator (Numerical Recipes).
_FACTOR, _SUMMAND, _MODULUS = 1664525, 1013904223, 1 << 32

#: Seed of the blocks that a model which denoises begins with.
_SEED = 20

#: Of a model's generation config, what is taken over.
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
_CACHE = ("use_cache", "cache_implementation", "cache_config")


def workload_tokens(workload: Workload, vocabulary: int) -> list[list[int]]:
    """Return the token ids of a workload: the same on every machine, for the same vocabulary size.

    The lowest ids are left out where there are enough others: tokenizers keep their special tokens there.
    """
    lowest = 64 if vocabulary > 256 else 0
    rows = []
    for row in range(workload.batch):
        state = row + 1
        ids = []
        for _ in range(workload.prompt_tokens):
            state = (state * _FACTOR + _SUMMAND) % _MODULUS
            ids.append(lowest + (state >> 8) % (vocabulary - lowest))
        rows.append(ids)
    return rows


def input_ids(loaded: Loaded, rows: list[list[int]]) -> Any:
    """Return token ids where the model takes its inputs: with its first weights; hooks move them on from there."""
    return torch.tensor(rows, dtype=torch.long, device=input_device(loaded))


def check_length(job: Job) -> None:
    """Raise ValueError where the workload is longer than the model's positions; on a GPU that would end the process."""
    workload, config = job.spec.workload, read_config(Path(job.checkpoint.path))
    length = workload.prompt_tokens + workload.new_tokens
    for part in (config, config.get("text_config") or {}):
        for name in ("max_position_embeddings", "n_positions"):
            limit = part.get(name)
            if isinstance(limit, int) and 0 < limit < length:
                raise ValueError(f"workload {workload} needs {length} positions, the model has {limit}")


def first_forward(loaded: Loaded, heard: Sequence[int] = ()) -> Any:
    """Return the logits of the workload's first row, 1 x position x vocabulary.

    For a model without logits, the last hidden state is returned. ``heard`` are token ids that an adapter reacts to:
    they take the place of the row's from its second one on.
    """
    workload = Workload(1, loaded.job.spec.workload.prompt_tokens, 1)
    (row,) = workload_tokens(workload, vocabulary(loaded))
    ids = input_ids(loaded, [row[:1] + list(heard) + row[1 + len(heard) :]])
    output = _with_named_inputs(loaded, lambda: _forward(loaded, ids))
    logits = getattr(output, "logits", None)
    return logits if logits is not None else output[0]


def _with_named_inputs(loaded: Loaded, call: Callable[[], Any]) -> Any:
    """Run the model, and once more with the input that its error names as missing, which later runs get at once."""
    try:
        return call()
    except ValueError as error:
        if not (named := named_inputs(loaded, error)):
            raise
        loaded.named_inputs += named
    return call()


def _forward(loaded: Loaded, ids: Any) -> Any:
    inputs = {**forward_inputs(loaded, ids), **loaded.attached.arguments(1, ids.device)}
    # Not inference_mode: bitsandbytes replaces values of parameters in a forward, and those would stay inference
    # tensors that a test's own code cannot use.
    with torch.no_grad():
        return loaded.outermost(**inputs)


def can_generate(loaded: Loaded) -> bool:
    """Return true if the model's class has ``generate``, and does not say that it cannot."""
    model = loaded.model
    return hasattr(model, "generate") and (not hasattr(model, "can_generate") or bool(model.can_generate()))


def no_single_tokens(loaded: Loaded) -> str:
    """Return why tokens cannot be timed and counted one by one; empty if they can.

    A class that denoises blocks of tokens has settings of a class of its own, without greedy decoding.
    """
    if not can_generate(loaded):
        return "the model does not generate"
    own = getattr(loaded.model, "generation_config", None)
    return "" if own is None or hasattr(own, "do_sample") else "the model generates blocks of tokens, not single ones"


def settings(loaded: Loaded, new_tokens: int) -> Any:
    """Return transformers' settings for exactly ``new_tokens``, greedy.

    Of the model's own settings only special tokens, the cache and what its class's ``generate`` alone knows are kept.
    What a checkpoint's generation_config.json says beside them changes what is computed (beams, penalties, assistants)
    or returned. A quantised cache whose package is missing is left out, with a note.
    """
    from transformers import GenerationConfig

    own = loaded.model.generation_config
    kept = {name: getattr(own, name, None) for name in (*_TOKENS, *_CACHE)}
    if kept["cache_implementation"] == "quantized" and not _can_quantise_cache(kept["cache_config"]):
        kept |= dict.fromkeys(("cache_implementation", "cache_config"))
        note = (
            "its generation_config.json requests a quantised cache, whose package is not installed: the usual cache "
            "is used"
        )
        loaded.notes += [note] if note not in loaded.notes else []
    if required_by_generate(loaded.model):
        plain = GenerationConfig()
        # What the class's own generate() reads there and no other class knows, such as tokens that stand for composers.
        kept |= {name: value for name, value in vars(own).items() if name[0] != "_" and not hasattr(plain, name)}
    kept = {name: value for name, value in kept.items() if value is not None}
    return GenerationConfig(**kept, do_sample=False, num_beams=1, min_new_tokens=new_tokens, max_new_tokens=new_tokens)


def _can_quantise_cache(config: Any) -> bool:
    """Return true if the package of a quantised cache's backend is installed; transformers refuses an unknown one."""
    backend = config.get("backend", "") if isinstance(config, dict) else ""
    return all(method.is_installed() for method in methods() if backend in method.cache_backends)


@contextmanager
def generation_config_set(model: Any, config: Any) -> Iterator[None]:
    """Have the model generate with a config only: what one that is passed lacks, generate() takes from the model's.

    So does the language model that a class hands its embeddings on to. Their own objects are not changed, and are back
    in their places afterwards.
    """
    own = generating_module(model)
    holders = [*([model] if own is not model else []), *_generating_parts(own)]
    before = [(holder, vars(holder)["generation_config"]) for holder in holders if "generation_config" in vars(holder)]
    for holder, _ in before:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, own in before:
            holder.generation_config = own


def _generating_parts(module: Any) -> Iterator[Any]:
    """Yield a module, and the modules right below it that have a generation config of their own."""
    yield module
    for child in module.children() if isinstance(module, torch.nn.Module) else ():
        if "generation_config" in vars(child):
            yield from _generating_parts(child)


def generate_ids(
    loaded: Loaded,
    ids: Any,
    new_tokens: int,
    on_token: Callable[[], None] | None = None,
    on_logits: Callable[[Any], None] | None = None,
) -> Any:
    """Return the new token ids, batch x ``new_tokens``: greedy, end-of-sequence ignored.

    ``on_token`` is called after each. ``on_logits`` is given the logits of each, batch x vocabulary in fp32, in which
    those of the tokens that end a sequence are -inf; not where a class of the user's own generates in its own way, and
    neither where it generates blocks.
    """
    return _with_named_inputs(loaded, lambda: _generated(loaded, ids, new_tokens, on_token, on_logits))


def _generated(
    loaded: Loaded,
    ids: Any,
    new_tokens: int,
    on_token: Callable[[], None] | None,
    on_logits: Callable[[Any], None] | None,
) -> Any:
    inputs = generate_inputs(loaded, ids, new_tokens=new_tokens)
    inputs |= loaded.attached.arguments(len(ids), ids.device)
    if no_single_tokens(loaded):
        return _generate_blocks(loaded, inputs, new_tokens)
    if on_token is not None:

        def tell(sequences: Any, scores: Any, **rest: Any) -> Any:
            on_token()
            return torch.zeros(sequences.shape[0], dtype=torch.bool, device=sequences.device)

        inputs["stopping_criteria"] = [tell]
    model = loaded.model
    with torch.no_grad():
        if getattr(model, "generation_config", None) is None:
            # A class of the user's own that generates in its own way.
            lengths = dict.fromkeys(("min_new_tokens", "max_new_tokens"), new_tokens)
            sequences = model.generate(**inputs, do_sample=False, num_beams=1, **lengths)
        else:
            config = settings(loaded, new_tokens)
            if on_logits is not None:

                def look(logits: Any) -> Any:
                    on_logits(logits)
                    return logits

                # Not a hook on the model, whose forward may be compiled with what hangs on it.
                inputs["logits_processor"] = [LogitsProcessor(look)]
            with generation_config_set(model, config):
                sequences = model.generate(**inputs, generation_config=config)
    return sequences[:, -new_tokens:]


def _generate_blocks(loaded: Loaded, inputs: dict[str, Any], new_tokens: int) -> Any:
    """Generate with a class's own settings, of whole blocks from random ones; the random numbers are always the same.

    What the settings of other classes know, such as greedy decoding, has no meaning there.
    """
    config = copy.deepcopy(loaded.model.generation_config)
    config.max_new_tokens, config.return_dict_in_generate, config.eos_token_id = new_tokens, False, None
    with torch.no_grad(), torch.random.fork_rng(), generation_config_set(loaded.model, config):
        torch.manual_seed(_SEED)
        sequences = loaded.model.generate(**inputs, generation_config=config)
    prompt_tokens = inputs["input_ids"].shape[1]
    return sequences[:, prompt_tokens : prompt_tokens + new_tokens]


def generate_workload(
    loaded: Loaded,
    on_token: Callable[[], None] | None = None,
    new_tokens: int | None = None,
    on_logits: Callable[[Any], None] | None = None,
) -> Any:
    """Generate the workload's tokens, or so many of them, from its prompt."""
    workload = loaded.job.spec.workload
    ids = input_ids(loaded, workload_tokens(workload, vocabulary(loaded)))
    return generate_ids(loaded, ids, new_tokens or workload.new_tokens, on_token, on_logits)


def generate(loaded: Loaded, given: Prompt, max_new_tokens: int = 16) -> dict[str, Any]:
    """Return exactly ``max_new_tokens`` new ``tokens``, their ``text`` and ``count``, as ``llm.generate`` gives them.

    Greedy, and the end of the sequence is ignored, so that the number of tokens is the test's, not the model's.
    Raises ValueError for text or a chat where there is no tokenizer; ``text`` is then empty for token ids. Raises
    ValueError for ids that the model has no embedding for, which on a GPU would spoil the process.
    """
    row = token_ids(loaded.tokenizer, loaded.tokenizer_error, given)
    size = embedded_tokens(loaded)
    for token in row:
        if size is not None and token not in range(size):
            raise ValueError(f"the model has embeddings for the token ids 0 to {size - 1}; got {token}")
    tokens = [int(token) for token in generate_ids(loaded, input_ids(loaded, [row]), max_new_tokens)[0]]
    text = loaded.tokenizer.decode(tokens, skip_special_tokens=True) if loaded.tokenizer is not None else ""
    return {"tokens": tokens, "text": text, "count": len(tokens)}
