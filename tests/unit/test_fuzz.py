"""Every parser on mutated input: some hundred here, as many as are asked for with ``make fuzz``."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_llmload.baselines import codec
from pytest_llmload.core.errors import BaselineError, LoadFailed
from pytest_llmload.core.presets import PRESETS
from pytest_llmload.system.json_text import Unreadable, parse, read_json
from pytest_llmload.system.protocol import Garbled, read_message
from pytest_llmload.worker.adapters.files import read_adapter_config
from pytest_llmload.worker.checkpoints.digests import read_config, shape_digest
from pytest_llmload.worker.checkpoints.headers import read_header, read_index

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "fuzz.py")
assert _SPEC is not None
assert _SPEC.loader is not None
fuzz: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["fuzz"] = fuzz
_SPEC.loader.exec_module(fuzz)

NAMES = ("baseline", "header", "config", "index", "adapter", "frame", "report", "option", "marker")


@pytest.mark.parametrize("name", NAMES)
def test_every_input_ends_in_a_documented_sentence(name: str, tmp_path: Path) -> None:
    targets = fuzz.targets(tmp_path)
    assert set(targets) == set(NAMES)
    outcome = fuzz.fuzz(targets[name], 300, seed=1)
    assert outcome.bad == []
    assert outcome.refused


def test_the_fuzzer_finds_what_is_planted() -> None:
    def careless(data: bytes) -> None:
        parse(data)["shape"][0]

    def endless(data: bytes) -> None:
        begin = time.process_time()
        while time.process_time() - begin < 0.6:
            pass

    def talkative(data: bytes) -> None:
        raise ValueError(f"line\n{data.decode(errors='replace')}")

    for parser, count, told in (
        (careless, 100, "Error: "),
        (endless, 1, "took 0."),
        (talkative, 1, "not one printable"),
    ):
        outcome = fuzz.fuzz(fuzz.Target(parser, (b'{"shape": [1]}',), ValueError), count, seed=1)
        assert told in outcome.bad[0]


def header(folder: Path, text: str) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + bytes(8))
    return path


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}',
        '{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": 5, "shape": [2], "data_offsets": [0, 8]}}',
        '{"a": [0, 1]}',
        '{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 8]}}',
        "[" * 100_000,
        "[]",
        "5",
    ],
)
def test_a_header_that_is_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="has no readable safetensors header: ") as caught:
        read_header(header(tmp_path, text))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"num_attention_heads": "2", "hidden_size": 64}', "num_attention_heads is '2', expected is a whole number"),
        ('{"quantization_config": "x"}', "quantization_config is 'x', expected is an object"),
        ('{"architectures": 5}', "architectures is 5, expected is a list"),
        ('{"architectures": [5]}', r"architectures is \[5\], expected is a list of names"),
        ('{"text_config": {"hidden_size": true}}', "hidden_size is true, expected is a whole number"),
        ('{"a": ' + "[" * 90 + "]" * 90 + "}", "is nested too deeply"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"a": 123456789012345678901}', "holds a whole number of 21 digits"),
        (json.dumps([[]] * 100_001), "opens 100002 objects and lists, but at most 100000 are read"),
        (json.dumps({f"a{number}": 1 for number in range(10_001)}), "has 10001 fields in one object"),
    ],
)
def test_a_config_of_wrong_types(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LoadFailed, match=told):
        read_config(tmp_path)


#: The shapes that a large config may have, and what one more entry of it costs in bytes.
LARGE: dict[str, tuple[Callable[[int], Any], int]] = {
    "text": (lambda count: "a" * count, 1),
    "numbers": (lambda count: [1] * count, 3),
    "fractions": (lambda count: [1.5] * count, 5),
    "texts": (lambda count: ["a"] * count, 5),
    "lists": (lambda count: [[]] * count, 4),
    "objects": (lambda count: [{"a": [1]}] * count, 12),
    "labels": (lambda count: {str(number): f"LABEL_{number}" for number in range(count)}, 26),
    "modules": (lambda count: [f"model.layers.{number}.mlp" for number in range(count)], 27),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_config_of_five_megabytes_costs_little(kind: str, tmp_path: Path) -> None:
    make, each = LARGE[kind]
    config = {**PRESETS["tiny-llama"], "entry": make(5_000_000 // each)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (tmp_path / "config.json").stat().st_size > 4_500_000
    del config
    # The least of up to three: other processes make all of them slower, never faster. A slower machine gets its share.
    most, seconds = max(0.3, 12 * min(_unit() for _ in range(3))), [_seconds(tmp_path)]
    while seconds[-1] >= most and len(seconds) < 3:
        seconds.append(_seconds(tmp_path))
    assert min(seconds) < most


def _unit() -> float:
    """Return the CPU time of a million additions: some 25 ms."""
    begin, total = time.process_time(), 0
    for number in range(1_000_000):
        total += number
    return time.process_time() - begin


def _seconds(directory: Path) -> float:
    begin = time.process_time()
    with contextlib.suppress(LoadFailed):
        shape_digest(read_config(directory), [])
    return time.process_time() - begin


@pytest.mark.parametrize(
    "text",
    [
        '{"metadata": {}, "weight_map": {}}',
        '{"metadata": {}, "weight_map": {"a": "%s"}}' % ("x" * 300),
        '{"metadata": {}, "weight_map": {"a": "x\\u0000"}}',
        '{"metadata": {}, "weight_map": {"a": 5}}',
        '{"metadata": 5, "weight_map": {"a": "b"}}',
    ],
)
def test_an_index_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(LoadFailed, match=r"is not a readable index|is not a file name") as caught:
        read_index(tmp_path / "index.json")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["5", '{"lora_alpha": "x"}', '{"alpha_pattern": 5}', '{"peft_type": []}', "{"])
def test_an_adapters_config_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(LoadFailed, match=r"adapter_config\.json"):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize(
    "frame",
    [
        b"", b"{", b"5", b"{}", b'{"kind": 5}', b'{"kind": "unknown"}', b'{"kind": "phase"}',
        b'{"kind": "exited", "pid": "1"}',
        b'{"kind": "error", "outcome": "failed", "error": {"message": 5}}', b"\xff" * 20,
        b'{"kind": "error", "outcome": "failed", "error": {"message": "m", "unknown": ""}}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_frame_that_is_no_message(frame: bytes) -> None:
    with pytest.raises(Garbled, match="arrived") as caught:
        read_message(frame)
    assert len(str(caught.value)) < 300


def recorded() -> str:
    texts = (path.read_text() for path in sorted((ROOT / "baselines").rglob("*.json")))
    return min((text for text in texts if '"indices": ""' in text), key=len)


def test_a_small_baseline_does_not_cost_seconds() -> None:
    text = recorded().replace('"indices": ""', '"indices": "1-999999"', 1)
    assert text != recorded()
    begin = time.process_time()
    with pytest.raises(BaselineError, match=r"describes 1000[0-9]{3} modules in its manifest"):
        codec.loads(text, "x.json")
    assert time.process_time() - begin < 0.5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" + "1," * (1 << 20) + "1]", r"x\.json has 2097155 characters, but a baseline has at most 2097152: "),
        ("[" + "[]," * 100_000 + "[]]", r"x\.json opens 100002 objects and lists, but a baseline has at most 100000: "),
    ],
)
def test_a_baseline_of_megabytes_is_not_read(text: str, told: str) -> None:
    with pytest.raises(BaselineError, match=told):
        codec.loads(text, "x.json")


def test_what_cannot_be_written_is_refused_when_it_is_read() -> None:
    text = recorded().replace('"workload": "', '"workload": "\\ud800', 1)
    with pytest.raises(BaselineError, match="half a character"):
        codec.loads(text, "x.json")


def test_control_characters_of_a_baseline_are_quoted() -> None:
    text = recorded().replace('"schema"', '"\\u001b[31m\\u009b\\u202e"', 1)
    with pytest.raises(BaselineError) as caught:
        codec.loads(text, "x.json")
    assert str(caught.value).isprintable()


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(LoadFailed, match="is not a regular file"):
        read_config(tmp_path)
    (tmp_path / "x").write_text("{} ")
    with pytest.raises(Unreadable, match="has 3 bytes, but at most 2"):
        read_json(tmp_path / "x", most=2)
