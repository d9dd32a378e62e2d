"""Mutated input for every parser of files, frames, options and markers: each input must end in a documented sentence.

    python benchmarks/fuzz.py --count 100000               (each parser; make fuzz runs a minute in all)
    python benchmarks/fuzz.py --only header --seed 7 --count 1000

An input is a good one with some of its bytes or of its JSON values exchanged; the same seed gives the same inputs. A
parser may return, or raise the error that it documents: with one printable line that is not longer than a screen. It
must take less than half a second of CPU for each. Prints a line a parser, and the first inputs that ended otherwise;
exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pytest_llmload.baselines import codec, manifest
from pytest_llmload.core.errors import BaselineError, LoadFailed, ReportError
from pytest_llmload.core.spec import Workload
from pytest_llmload.core.units import parse_bytes, parse_seconds, parse_tolerance
from pytest_llmload.host.markers.table import markers
from pytest_llmload.host.settings.adapters import parse_adapter
from pytest_llmload.host.settings.models import parse_model
from pytest_llmload.reports import reading
from pytest_llmload.system.protocol import Closed, read_message
from pytest_llmload.worker.adapters.files import read_adapter_config
from pytest_llmload.worker.checkpoints.digests import read_config, shape_digest
from pytest_llmload.worker.checkpoints.headers import read_header, read_index

ROOT = Path(__file__).parents[1]
#: Seconds of CPU for one input, and characters of an error's text.
SLOWEST, LONGEST = 0.5, 2000
#: What JSON values are exchanged for.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.5, 2**63, 10**30, 1e308, "", "x", "2", "\ud800", "\x1b[31m\n", "é" * 300, "x/../",
    "0-999999", [], {}, [0, 0, 0], [[]], {"x": 1}, ["x"], "\x00", "../x", "nan",
)  # fmt: skip
CHARACTERS = '{}[]":,\\0123456789-+.eEtfnu \n\t\x00\x1b\x7fé\u202e/x'

Parser = Callable[[bytes], object]


@dataclass
class Target:
    """One parser, good input for it, and the error that it documents."""

    parse: Parser
    good: tuple[bytes, ...]
    error: type[Exception]


@dataclass
class Outcome:
    """What became of the inputs of one parser."""

    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0
    bad: list[str] = field(default_factory=list)


def mutated(good: bytes, source: random.Random) -> bytes:
    """Return an input with some of its JSON values or of its bytes exchanged."""
    data = good
    if source.random() < 0.6:
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if isinstance(value, (dict, list)):
            for _ in range(source.randint(1, 3)):
                value = _exchanged(value, source)
            data = json.dumps(value).encode()
        if source.random() < 0.005:
            data = b"[" * 100_000 + data
    if source.random() < 0.5:
        for _ in range(source.randint(1, 4)):
            data = _spoilt(data, source)
    return data


def _exchanged(value: Any, source: random.Random) -> Any:
    """Return a value with one inside it exchanged, left out, doubled or wrapped."""
    keys: list[Any] = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    if not keys or source.random() < 0.15:
        if source.random() < 0.05:
            deep: Any = value
            for _ in range(source.choice((10, 70, 400))):
                deep = [deep]
            return deep
        return source.choice(VALUES)
    key = source.choice(keys)
    copy = dict(value) if isinstance(value, dict) else list(value)
    action = source.random()
    if action < 0.15:
        del copy[key]
    elif action < 0.25 and isinstance(copy, dict):
        copy[source.choice(("", "x", "\ud800", "\x1b", "é" * 200))] = copy[key]
    elif action < 0.3 and isinstance(copy, list):
        copy += [copy[key]] * source.choice((1, 3, 100))
    else:
        copy[key] = _exchanged(copy[key], source)
    return copy


def _spoilt(data: bytes, source: random.Random) -> bytes:
    place = source.randint(0, len(data))
    action = source.random()
    if action < 0.25:
        return data[:place]
    if action < 0.5:
        return data[:place] + source.choice(CHARACTERS).encode() + data[place:]
    if action < 0.7:
        return data[:place] + source.choice(CHARACTERS).encode() + data[place + 1 :]
    if action < 0.8:
        return data[:place] + bytes([source.randint(0, 255)]) + data[place + 1 :]
    end = min(len(data), place + source.randint(1, 20))
    return data[:place] + data[place:end] * source.choice((0, 2, 50)) + data[end:]


def fuzz(target: Target, count: int, seed: int, stop: float = float("inf")) -> Outcome:
    """Return what became of so many mutated inputs, or of those until a moment of ``time.monotonic``."""
    outcome = Outcome()
    source = random.Random(seed)
    for _ in range(count):
        if time.monotonic() > stop:
            break
        data = mutated(source.choice(target.good), source)
        outcome.inputs += 1
        begin = time.process_time()
        wrong = _tried(target, data, outcome)
        seconds = time.process_time() - begin
        outcome.slowest = max(outcome.slowest, seconds)
        if seconds > SLOWEST:
            wrong = wrong or f"took {seconds:.1f} s"
        if wrong:
            outcome.bad.append(f"{wrong}: {data[:200]!r}")
    return outcome


def _tried(target: Target, data: bytes, outcome: Outcome) -> str:
    """Return what is wrong with how an input ended; empty where nothing is."""
    try:
        target.parse(data)
    except target.error as error:
        outcome.refused += 1
        text = str(error)
        if len(text) > LONGEST:
            return f"an error of {len(text)} characters"
        return "" if text and text.isprintable() else f"an error that is not one printable line, {text[:200]!r}"
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return f"{type(error).__name__}: {str(error)[:100]!r}"
    return ""


def targets(folder: Path) -> dict[str, Target]:
    """Return every parser by name; those of files read and write in ``folder``."""
    baselines = sorted((ROOT / "baselines").rglob("*.json"), key=lambda path: path.stat().st_size)
    recorded = tuple(path.read_bytes() for path in baselines[:3])
    known = codec.loads(recorded[0].decode(), "known")
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, "a": entry, "b": {**entry, "data_offsets": [24, 48]}}
    ).encode()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2, "torch_dtype": "bfloat16",
        "text_config": {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }  # fmt: skip
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-2.st"}}
    adapter = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "alpha_pattern": {"q_proj": 4}, "target_modules": ["q"]}
    report = {"schema": 1, "runs": [], "stale": ["a"], "notes": ["b"]}
    frames = (
        {"kind": "phase", "phase": "load"}, {"kind": "exited", "pid": 1, "status": 0}, {"kind": "result", "result": {}},
        {"kind": "error", "outcome": "failed", "error": {"message": "m", "type_name": "t", "traceback": "", "log": ""}},
    )  # fmt: skip

    def read_baseline(data: bytes) -> None:
        read = codec.loads(data.decode(errors="replace"), "baseline")
        codec.dumps(read).encode()
        for change in manifest.diff(known.manifest, read.manifest):
            change.text.encode()

    def as_file(name: str, read: Callable[[Path], object], data: bytes) -> object:
        (folder / name).write_bytes(data)
        return read(folder / name)

    def read_directory(data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        shape_digest(read_config(folder), [])

    def read_weights(data: bytes) -> None:
        (folder / "header").write_bytes(struct.pack("<Q", len(data)) + data + bytes(48))
        read_header(folder / "header")

    def read_adapter(data: bytes) -> None:
        (folder / "adapter_config.json").write_bytes(data)
        read_adapter_config(folder)

    def option(data: bytes) -> None:
        text = data.decode(errors="surrogateescape")
        parsers: tuple[Callable[[str], object], ...] = (
            parse_bytes, parse_seconds, partial(parse_tolerance, unit="B"), Workload.parse,
            partial(parse_model, base=folder), partial(parse_adapter, base=folder, root=folder),
        )  # fmt: skip
        refusals = []
        for parse in parsers:
            try:
                parse(text)
            except ValueError as error:
                refusals.append(str(error))
        if refusals:
            # The worst of them is looked at: one that is long, or that cannot be printed.
            raise ValueError(max(refusals, key=lambda text: (not text.isprintable(), len(text))))

    def marker(data: bytes) -> None:
        value = json.loads(data)
        if not isinstance(value, dict):
            return
        keywords = {key: each for key, each in value.items() if key.isidentifier()}
        for kind in markers().values():
            mark = getattr(pytest.mark, kind.name).with_args(*tuple(value.values())[:2], **keywords).mark
            kind.bind(mark, "test_it.py::test")

    def usable(parse: Parser, data: bytes) -> None:
        try:
            json.loads(data)
        except (ValueError, RecursionError):
            return
        parse(data)

    return {
        "baseline": Target(read_baseline, recorded, BaselineError),
        "header": Target(read_weights, (header,), LoadFailed),
        "config": Target(read_directory, (json.dumps(config).encode(),), LoadFailed),
        "index": Target(partial(as_file, "index", read_index), (json.dumps(index).encode(),), LoadFailed),
        "adapter": Target(read_adapter, (json.dumps(adapter).encode(),), LoadFailed),
        "frame": Target(read_message, tuple(json.dumps(frame).encode() for frame in frames), Closed),
        "report": Target(
            lambda data: as_file("report", reading.read, data), (json.dumps(report).encode(),), ReportError
        ),
        "option": Target(
            option, (b"8GiB", b"1x128+32", b"1%", b"30s", b"org/model@main", b"random:tiny-llama"), ValueError
        ),
        "marker": Target(partial(usable, marker), (b'{"load": "30s", "gpu": "9GiB", "n": 2}',), pytest.UsageError),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="inputs of each parser")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after so many seconds in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", help="one parser; may be repeated")
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        found = targets(Path(name))
        chosen = options.only or list(found)
        for number, target in enumerate(chosen, 1):
            left = options.seconds / len(chosen) if options.seconds else float("inf")
            outcome = fuzz(found[target], options.count, options.seed, time.monotonic() + left)
            print(
                f"{number}/{len(chosen)} {target:9} {outcome.inputs:7} inputs, {outcome.refused:7} refused, "
                f"{len(outcome.bad):5} undocumented, slowest {outcome.slowest:.3f} s of CPU",
                *outcome.bad[:5],
                sep="\n    ",
            )
            bad += len(outcome.bad)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
