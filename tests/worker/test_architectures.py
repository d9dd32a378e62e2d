"""A sample of transformers' architectures, each a kind of case, tiny and random, in this process.

``benchmarks/architectures.py`` measures all of them under every strategy; what it finds is docs/architectures.md.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from loads import CACHE, quick

from pytest_llmload.core.job import Checkpoint
from pytest_llmload.core.results import LoadResult
from pytest_llmload.worker.checkpoints.random_adapter import resolve_adapter
from pytest_llmload.worker.checkpoints.resolve import resolve
from pytest_llmload.worker.checks import computed_buffers

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import planted_architecture
import tiny_configs

_FAMILIES = tiny_configs.types()
#: Loaded, run and generated with as they are.
_PLAIN = ("gpt2", "qwen3", "opt", "bloom", "phi3", "gemma2", "mamba", "mixtral")
#: Parameters or buffers stand directly on a container.
_OFFLOADED = ("bert", "gpt_bigcode", "ctrl", "electra", "roberta", "xlm", "distilbert", "zamba")
#: No layer lies past the middle of the bytes.
_HEAVY_ENDS = ("rembert", *(("gemma4_unified",) if "gemma4_unified" in _FAMILIES else ()))
#: Encoder and decoder; the decoder needs a token to start with.
_SEQ2SEQ = ("marian", "t5", "mt5", "pegasus", "umt5", "bart")
#: The text part is nested.
_COMPOSITE = ("gemma3", "llava", "qwen2_vl", "llama4")


@functools.cache
def tiny(model_type: str) -> Checkpoint:
    folder = CACHE / "configs" / model_type
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_configs.tiny(model_type, _FAMILIES[model_type])
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return resolve(f"random:{folder}", CACHE)


def loaded(model_type: str, **fields: Any) -> LoadResult:
    result = quick(tiny(model_type), **fields)
    assert not result.faults, result.faults
    return result


def names(result: LoadResult) -> str:
    return " ".join(name for problem in result.problems for name in problem.names)


@pytest.mark.parametrize("model_type", _PLAIN)
def test_it_is_loaded_run_and_recognised(model_type: str) -> None:
    result = loaded(model_type)
    assert result.problems == []
    assert result.numbers.padded
    assert result.settings["attention"]


@pytest.mark.parametrize("model_type", _OFFLOADED)
def test_it_is_offloaded_without_hooks_around_all_of_it(model_type: str) -> None:
    assert loaded(model_type, strategy="offload").problems == []


@pytest.mark.parametrize("model_type", _HEAVY_ENDS)
def test_a_model_of_heavy_ends_has_its_last_layer_offloaded(model_type: str) -> None:
    result = loaded(model_type, strategy="offload")
    assert result.problems == []
    whole = [row.bytes for row in loaded(model_type).manifest if "layer" in row.module]
    moved = [row.bytes for row in result.manifest if row.device == "disk"]
    # One of two layers.
    assert sum(moved) == pytest.approx(sum(whole) / 2, rel=0.1)


@pytest.mark.skipif("longcat_flash" not in _FAMILIES, reason="an architecture of transformers 5")
def test_weights_that_are_read_while_they_are_not_loaded_are_told() -> None:
    """torch's linear of a CPU tensor and a meta weight gives memory as it was found: some logits, others each time."""
    found = {problem.check: problem for problem in loaded("longcat_flash", strategy="offload").problems}
    assert found["offloaded"].message == (
        "model.layers.1.mlp.router computes with weights that are offloaded and not loaded at that moment: its output "
        "is undefined"
    )
    assert "LongcatFlashTopkRouter reads some at a different moment" in found["offloaded"].hint


@pytest.mark.parametrize(("model_type", "reader"), [("dbrx", "DbrxExperts"), ("jetmoe", "JetMoeMoA")])
def test_a_class_that_cannot_be_offloaded_is_named(model_type: str, reader: str) -> None:
    """Neither runs in a bare script: their modules read weights of others."""
    (problem,) = loaded(model_type, strategy="offload").problems
    assert problem.check == "forward"
    assert f"own forward only, and {reader} reads some at a different moment" in problem.hint


@pytest.mark.parametrize("model_type", _SEQ2SEQ)
def test_an_encoder_and_decoder_generate(model_type: str) -> None:
    result = loaded(model_type)
    assert result.problems == []
    assert "generate" in result.phases
    assert isinstance(json.loads((Path(tiny(model_type).path) / "generation_config.json").read_text()), dict)


@pytest.mark.parametrize("model_type", _COMPOSITE)
def test_a_model_of_several_parts_has_a_tokenizer_and_generates(model_type: str) -> None:
    result = loaded(model_type)
    assert result.problems == []
    assert (Path(tiny(model_type).path) / "tokenizer.json").exists()
    assert "generate" in result.phases


@pytest.mark.parametrize("fields", [{}, {"quant": "nf4"}, {"adapter": "random"}], ids=["none", "nf4", "lora"])
def test_a_model_that_hears_is_given_sound(fields: dict[str, Any]) -> None:
    result = loaded("speech_to_text", **fields)
    assert result.problems == []
    assert "generate" in result.phases
    assert result.numbers.padded


def test_a_model_that_hashes_characters_has_no_vocabulary() -> None:
    assert loaded("canine").problems == []


@pytest.mark.parametrize("model_type", ["albert", "distilbert", "layoutlm", "canine", "mamba2", "git", "speecht5"])
def test_a_random_lora_on_other_models_than_decoders(model_type: str) -> None:
    result = loaded(model_type, adapter="random")
    assert result.problems == []
    assert result.metrics["weights.adapter"] > 0


@pytest.mark.parametrize(
    ("model_type", "weight"),
    [
        ("xlnet", "rel_attn.q"),
        ("recurrent_gemma", "gate_weight"),
        ("zamba", "x_proj_weight"),
        ("mixtral", "experts.gate_up_proj"),
        *([("deepseek_v4", "attn_hc.fn")] if "deepseek_v4" in _FAMILIES else []),
    ],
)
def test_a_dense_matrix_is_named_wherever_it_stands(model_type: str, weight: str) -> None:
    assert weight in names(loaded(model_type, quant="nf4"))


def test_a_matrix_that_reading_text_does_not_use_is_noted() -> None:
    result = loaded("gemma3", quant="nf4")
    assert any("mm_input_projection_weight" in note for note in result.notes)


def test_the_cause_of_a_shared_block_left_dense_is_named() -> None:
    messages = " ".join(problem.message for problem in loaded("zamba", quant="nf4").problems)
    assert "tied to those of model.layers." in messages


def test_weights_that_the_class_keeps_dense_are_told_with_their_dtype() -> None:
    messages = " ".join(problem.message for problem in loaded("t5", dtype="bf16", quant="nf4").problems)
    assert "32 bit" not in messages
    assert "_keep_in_fp32_modules), here in bfloat16" in messages


def test_constants_that_the_class_writes_are_no_wrong_values() -> None:
    result = loaded("zaya")
    assert result.problems == []
    assert any("writes constants into" in note for note in result.notes)


def test_a_linear_that_is_smaller_than_a_block() -> None:
    """gemma3n has such; a Llama with narrow heads is enough."""
    folder = CACHE / "configs" / "small_linear"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "max_position_embeddings": 64}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32", **sizes, **heads}
    (folder / "config.json").write_text(json.dumps(config))
    result = quick(resolve(f"random:{folder}", CACHE), quant="nf4")
    assert not result.faults
    assert {problem.check for problem in result.problems} <= {"forward"}


@pytest.mark.parametrize("model_type", ["internlm3", "gemma3n_text"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_a_class_calls_itself_and_computes_in_its_dtype_is_no_change(model_type: str, dtype: str) -> None:
    """InternLM3 is loaded as a Llama; Gemma 3n computes scales in the dtype of the load."""
    assert loaded(model_type, dtype=dtype).problems == []


def test_rotary_frequencies_cast_to_16_bit_are_still_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_llmload.strategies.single import Single

    load = Single.load

    def casts(self: Single, job: Any, kwargs: dict[str, Any]) -> Any:
        given = load(self, job, kwargs)
        for module in given.model.modules():
            if "inv_freq" in module._buffers:
                module._buffers["inv_freq"] = module._buffers["inv_freq"].bfloat16()
        return given

    monkeypatch.setattr(Single, "load", casts)
    messages = [problem.message for problem in loaded("qwen3", dtype="bf16").problems]
    assert any("bfloat16, not float32" in text for text in messages)


def test_a_router_that_is_a_linear_is_quantised_by_the_library_and_noted() -> None:
    result = loaded("afmoe", quant="nf4")
    assert any("a Linear here, and quantised: model.layers.1.mlp.router.gate.weight" in note for note in result.notes)
    assert "router" not in names(result)


def test_the_last_weight_is_the_head_that_the_library_keeps_dense() -> None:
    """FSMT names its embedding as its output head, and has another."""
    assert loaded("fsmt", quant="int8").problems == []


@pytest.mark.parametrize("model_type", ["llama4_text", "phimoe"])
def test_a_router_that_gives_scores_and_choices_takes_no_random_adapter(model_type: str) -> None:
    assert loaded(model_type, adapter="random").problems == []


def test_a_model_whose_input_embedding_is_no_module() -> None:
    assert loaded("perceiver").problems == []


@pytest.mark.parametrize(
    "model_type",
    [
        *("vision-encoder-decoder", "speech-encoder-decoder", "pix2struct", "udop"),
        # An image in the prompt, whose places are known by a token or a mask, or which tokens attend to.
        *("instructblipvideo", "kosmos-2", "idefics"),
        # Sound that lasts as long as the text.
        *(("voxtral_realtime",) if "voxtral_realtime" in _FAMILIES else ()),
    ],
)
def test_a_model_that_sees_is_given_images_or_places_on_a_page(model_type: str) -> None:
    result = loaded(model_type)
    assert result.problems == []
    assert "generate" in result.phases
    assert result.numbers.padded


@pytest.mark.skipif("diffusion_gemma" not in _FAMILIES, reason="an architecture of transformers 5.23")
def test_a_model_that_denoises_blocks_of_tokens() -> None:
    """It starts from random blocks, with settings of a class of its own: those that it knows are written for it."""
    first, second = (loaded("diffusion_gemma") for _ in range(2))
    assert first.problems == []
    assert "generate" in first.phases
    assert first.numbers == second.numbers
    assert first.numbers.padded
    assert first.unavailable["ttft"] == "the model generates blocks of tokens, not single ones"
    settings = json.loads((Path(tiny("diffusion_gemma").path) / "generation_config.json").read_text())
    assert "do_sample" not in settings
    assert settings["pad_token_id"] == 0


@pytest.mark.parametrize("fields", [{}, {"adapter": "random"}])
def test_a_class_that_ends_a_sequence_with_a_separator_of_its_own(fields: dict[str, Any]) -> None:
    result = loaded("blip", **fields)
    assert result.problems == []
    assert "generate" in result.phases


def test_layers_whose_outputs_the_class_throws_away_are_told_apart_from_a_dead_adapter() -> None:
    # Without its CUDA kernel, the attention of MRA is zero (transformers/models/mra/modeling_mra.py).
    (problem,) = loaded("mra", adapter="random").problems
    assert problem.message == (
        "the adapter changes nothing: the logits with it and without it are the same, although 6 of the 8 layers that "
        "it tunes give other outputs: the model's own code does not use these"
    )


@pytest.mark.skipif("unlimited_ocr" not in _FAMILIES, reason="an architecture of transformers 5.23")
def test_an_adapter_whose_tensors_peft_renames_to_names_that_no_layer_has() -> None:
    first, second = loaded("unlimited_ocr", adapter="random").problems
    assert first.message.startswith(
        "16 of 16 tensors do not hold the values of the adapter's file: PEFT renames them as transformers renames the "
        "tensors of such checkpoints, model.language_model.layers.0."
    )
    assert "to model.language_model.language_model.layers.0." in first.message
    assert second.message == "the adapter changes nothing: the logits with it and without it are the same"


@pytest.mark.skipif("pp_formulanet" not in _FAMILIES, reason="an architecture of transformers 5")
def test_a_class_that_peft_cannot_tune_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="has no linear layer that PEFT tunes with a LoRA; give an adapter"):
        resolve_adapter("random", tiny("pp_formulanet"), CACHE)


def test_a_text_model_that_owns_buffers_is_constructed_for_them_without_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gemma 3n's scales stand on its text model: their values are compared, and its weights are held once."""
    constructing = computed_buffers._constructed
    constructed: list[Any] = []

    def noted(module: Any, dtype: Any) -> Any:
        constructed.append(constructing(module, dtype))
        return constructed[-1]

    monkeypatch.setattr(computed_buffers, "_constructed", noted)
    result = loaded("gemma3n_text")
    assert result.problems == []
    (whole,) = [module for module in constructed if type(module).__name__ == "Gemma3nTextModel"]
    assert {param.device.type for param in whole.parameters()} == {"meta"}
    assert {buffer.device.type for buffer in whole.buffers()} == {"cpu"}
    assert float(whole.per_layer_input_scale) == pytest.approx(2**-0.5)
    assert not [note for note in result.notes if "were not compared" in note and "per_layer_input_scale" in note]


@pytest.mark.parametrize("fault", planted_architecture.FAULTS)
def test_what_the_sweep_plants_is_caught_and_recognised(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted_architecture, "_KEPT", [])
    fields = planted_architecture.FAULTS[fault]
    assert planted_architecture.said(fault, loaded("electra", **fields).to_json()) == ""
    loading = transformers.PreTrainedModel.from_pretrained
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", loading)
    planted_architecture.plant(fault)
    assert planted_architecture.said(fault, loaded("electra", **fields).to_json())


@pytest.mark.skipif("rwkv" not in _FAMILIES, reason="an architecture of transformers")
def test_a_class_that_quantises_its_weights_anew_in_the_first_forward() -> None:
    """RWKV divides some weights before it runs, and quantises them again with the library's default type."""
    (problem,) = loaded("rwkv", quant="nf4").problems
    assert problem.message == (
        "the first forward made 4 of 14 quantised weights fp4, which were nf4 when the load returned"
    )
    assert "attention.output" in problem.names[0]
    assert loaded("rwkv", quant="fp4").problems == []


@pytest.mark.skipif("neomme" not in _FAMILIES, reason="an architecture of transformers 5.23")
def test_a_linear_that_two_places_share_is_told_once() -> None:
    (problem,) = loaded("neomme", quant="nf4").problems
    assert "they are tied to those of unembedding_projection, and transformers leaves tied weights dense" in (
        problem.message
    )
