"""Built checkpoints load whole, everywhere, and behave so that faults and int8's outlier path show."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.presets import PRESETS
from pytest_llmload.worker.checkpoints import build as building
from pytest_llmload.worker.checkpoints.headers import Tensor, read_header
from pytest_llmload.worker.checkpoints.random_adapter import build_adapter
from pytest_llmload.worker.checkpoints.resolve import resolve
from pytest_llmload.worker.checkpoints.tokenizer import write_tokenizer
from pytest_llmload.worker.checkpoints.weights import read_tensors

TINY = [name for name in PRESETS if name.startswith("tiny-")]
TOKENS = (torch.arange(3, 67) * 7919 % 1000 + 3)[None]


def load(name: str, cache: Path, **options: Any) -> Any:
    path = resolve(f"random:{name}", cache).path
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(TOKENS).logits.float()
    assert found.isfinite().all()
    return found


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", TINY)
def test_a_preset_loads_whole_in_every_dtype_and_generates(name: str, cache: Path) -> None:
    exact = logits(load(name, cache, dtype=torch.float32))
    for dtype, error in ((torch.bfloat16, 0.2), (torch.float16, 0.03)):
        assert 0 < distance(logits(load(name, cache, dtype=dtype)), exact) < error
    model = load(name, cache, dtype="auto")
    assert model.dtype == getattr(torch, PRESETS[name]["dtype"])
    assert model.generation_config.eos_token_id is None
    out = model.generate(TOKENS[:, :8], max_new_tokens=24, do_sample=False)
    assert out.shape == (1, 32), "nothing may end a generation early"
    assert len(set(out[0, 8:].tolist())) > 1


@pytest.mark.parametrize("name", TINY)
def test_a_fault_in_one_layer_shows_above_bf16_noise(name: str, cache: Path) -> None:
    model = load(name, cache, dtype=torch.float32)
    exact = logits(model)
    noise = distance(logits(load(name, cache, dtype=torch.bfloat16)), exact)
    shown = {}
    for parameter_name, parameter in model.named_parameters():
        is_norm = parameter.ndim == 1 and parameter_name.endswith("weight")
        if not is_norm and not parameter_name.endswith(("q_proj.weight", "query_key_value.weight", "c_attn.weight")):
            continue
        kept = parameter.data.clone()
        if is_norm:
            parameter.data.fill_(1.0)  # as transformers initialises a missing key
        else:
            parameter.data.copy_(torch.randn(kept.shape, generator=torch.Generator().manual_seed(1)) * kept.std())
        shown[parameter_name] = distance(logits(model), exact)
        parameter.data.copy_(kept)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(".inv_freq"):
            kept = buffer.clone()
            buffer.copy_(500_000.0 ** -(torch.arange(kept.numel()) / kept.numel()))
            shown[buffer_name] = distance(logits(model), exact)
            buffer.copy_(kept)
    assert len(shown) > 8
    assert {key: value for key, value in shown.items() if value < 1.3 * noise} == {}


@pytest.mark.parametrize("name", TINY)
def test_int8_sees_outlier_columns(name: str, cache: Path) -> None:
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = load(name, cache, dtype="auto", device_map={"": "cpu"}, quantization_config=settings)
    columns: dict[str, int] = {}

    def watch(path: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            columns[path] = int((inputs[0].abs() > module.state.threshold).any(dim=(0, 1)).sum())

        return hook

    for path, module in model.named_modules():
        # Fused experts flatten batch and position, and are not Linear8bitLt in every version.
        if type(module).__name__ == "Linear8bitLt" and "experts" not in path:
            assert module.state.threshold == 6.0
            module.register_forward_pre_hook(watch(path))
    assert logits(model).isfinite().all()
    # What a norm feeds: every projection but those of the attention's and the feed-forward's output.
    assert sum(count > 0 for count in columns.values()) >= len(columns) / 2, columns
    assert max(columns.values()) < 384, "outliers are the exception"


def test_the_file_has_the_same_bytes_under_every_version(cache: Path) -> None:
    path = Path(resolve("random:tiny-mixtral", cache).path)
    names = [tensor.name for tensor in read_tensors(path)]
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names
    assert hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()[:16] == "2a2449458e555604"


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-qwen3"])
def test_tied_weights_are_stored_once(name: str, cache: Path) -> None:
    assert not [t for t in read_tensors(Path(resolve(f"random:{name}", cache).path)) if "lm_head" in t.name]


def test_the_tokenizer_works(cache: Path) -> None:
    path = resolve("random:tiny-llama", cache).path
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text = "Hello, wörld 안녕 \n\t the quick <brown> fox"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == PRESETS["tiny-llama"]["vocab_size"]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    batch = tokenizer(["a", "a longer text"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch.input_ids[0, 0] == 0, "padded on the left, as generation needs"
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).endswith("<|assistant|>")
    assert tokenizer.decode(range(3, 1024)), "every id is a text"


@pytest.mark.parametrize("size", [64, 300, 30080, 151936])
def test_a_vocabulary_of_any_size_is_filled(size: int, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, {"vocab_size": size, "eos_token_id": [size - 1, 5], "bos_token_id": size + 7})
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(size))
    assert vocabulary["<|eos|>"] == size - 1
    encoded = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("the Quick fox éé")
    assert max(encoded.ids) < size


def test_a_config_of_ones_own_is_built(cache: Path, tmp_path: Path) -> None:
    """Another architecture, no dtype, several shapes that no preset has."""
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": 128,
        "d_ff": 256,
        "d_kv": 64,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": 320,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = resolve(f"random:{tmp_path}", cache)
    assert {tensor.dtype for tensor in read_tensors(Path(found.path))} == {"F32"}
    _, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(found.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = [Tensor(f"layers.{i}.mlp.up_proj.weight", (64, 128), "BF16") for i in range(5)]
    for name, limit in (("one", 1 << 30), ("many", 40_000)):
        (tmp_path / name).mkdir()
        building.write_weights(tmp_path / name, tensors, limit)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], whole[name])
    assert read_tensors(tmp_path / "many") == read_tensors(tmp_path / "one")


def test_two_that_ask_at_once_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, writing, go_on = [], threading.Event(), threading.Event()
    write = building.write_weights

    def slow(directory: Path, tensors: list[Tensor]) -> None:
        calls.append(directory)
        writing.set()
        assert go_on.wait(60)
        write(directory, tensors)

    monkeypatch.setattr(building, "write_weights", slow)
    found: list[Path] = []
    ask = [
        threading.Thread(target=lambda: found.append(building.build(PRESETS["tiny-llama"], "x", tmp_path)))
        for _ in range(2)
    ]
    ask[0].start()
    assert writing.wait(60)
    assert not building.built_path(PRESETS["tiny-llama"], "x", tmp_path).exists(), "half a checkpoint is none"
    ask[1].start()
    go_on.set()
    for thread in ask:
        thread.join(60)
    assert len(calls) == 1
    assert len(found) == 2
    assert found[0] == found[1]


def test_a_build_that_fails_leaves_nothing_and_the_next_clears_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    target = building.built_path(PRESETS["tiny-llama"], "x", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(building, "write_weights", full)
        with pytest.raises(MachineError, match=r"No space left on device.*--llm-cache-dir"):
            building.build(PRESETS["tiny-llama"], "x", tmp_path)
    assert [path for path in target.parent.iterdir() if path.is_dir()] == []
    killed = target.parent / f".{target.name}.abcdef"
    killed.mkdir()
    (killed / "model.safetensors").touch()
    assert building.build(PRESETS["tiny-llama"], "x", tmp_path) == target
    assert not killed.exists()


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=123 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(building, "write_weights", lambda *_: pytest.fail("nothing may be written"))
    with pytest.raises(MachineError) as caught:
        building.build(PRESETS["polyglot-ko-12.8b"], "polyglot-ko-12.8b", tmp_path)
    message = str(caught.value)
    assert "needs 24.27 GiB" in message
    assert "123.00 MiB are free" in message
    assert str(tmp_path) in message
    assert "--llm-cache-dir" in message


def test_an_architecture_that_transformers_does_not_know_is_a_sentence(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nosuchmodel", "architectures": ["NoSuchForCausalLM"]}')
    with pytest.raises(ValueError, match=r"transformers .* cannot build the architecture .*nosuchmodel") as caught:
        resolve(f"random:{tmp_path}", cache)
    assert "\n" not in str(caught.value)


def test_a_dtype_without_random_values_is_a_sentence(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float8_e4m3fn"}')
    with pytest.raises(ValueError, match=r"float8_e4m3fn.*float32, float16, bfloat16 only"):
        resolve(f"random:{tmp_path}", cache)


@pytest.mark.parametrize("name", TINY)
def test_a_random_adapter_changes_the_output_and_leaves_no_key_over(name: str, cache: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    checkpoint = resolve(f"random:{name}", cache)
    path = build_adapter(checkpoint, cache)
    base = load(name, cache, dtype=torch.float32)
    before = logits(base)
    model = PeftModel.from_pretrained(base, path)
    stored = load_file(path / "adapter_model.safetensors")
    held = {key.replace(".default", ""): value for key, value in model.named_parameters() if "lora_" in key}
    assert stored.keys() == held.keys()
    assert all(torch.equal(stored[key], held[key]) and stored[key].abs().max() > 0 for key in stored)
    assert 0.05 < distance(logits(model), before) < 1.2
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert build_adapter(checkpoint, cache) == path


def test_a_random_adapter_for_layers_of_unknown_names(cache: Path, tmp_path: Path) -> None:
    """Mamba has no attention: every linear layer but the head is tuned."""
    config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": 64, "state_size": 8}
    config |= {"num_hidden_layers": 2, "vocab_size": 320, "intermediate_size": 128, "time_step_rank": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = build_adapter(resolve(f"random:{tmp_path}", cache), cache)
    found = {tensor.tensor.name for tensor in read_header(path / "adapter_model.safetensors")}
    assert "base_model.model.backbone.layers.1.mixer.in_proj.lora_A.weight" in found
    assert not [name for name in found if "lm_head" in name]
