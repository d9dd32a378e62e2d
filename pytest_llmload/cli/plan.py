"""Predict a model's memory by every strategy, the context and batch that fit, where layers go, and the time to load.

No weights are read, built or downloaded; of a hub model, only the configuration is downloaded. torch and transformers
run in a separate process. The GPUs are this machine's, or those that --gpu names.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytest_llmload.cli import measured_cuts
from pytest_llmload.cli.measured_cuts import read_cuts
from pytest_llmload.cli.refused import CommandRefused, columns
from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.job import Gpu
from pytest_llmload.core.spec import Workload
from pytest_llmload.core.units import counted, format_bytes, format_seconds, parse_bytes
from pytest_llmload.host.loads.hardware import visible_gpus
from pytest_llmload.host.settings.models import Model, parse_model
from pytest_llmload.worker.planning.placement import CONTEXT

#: Total memory of GPUs in MiB, as NVML reports it.
KNOWN = {
    "t4": 15_360,
    "rtx3090": 24_576,
    "rtx4090": 24_564,
    "l4": 23_034,
    "a10g": 23_028,
    "l40s": 46_068,
    "a100-40gb": 40_960,
    "a100-80gb": 81_920,
    "h100": 81_559,
    "h200": 143_771,
}
_TIMEOUT = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="hub id, directory, random:PRESET or random:PATH of a config")
    parser.add_argument(
        "--gpu",
        metavar="SIZE",
        action="append",
        default=[],
        help=f"a GPU instead of this machine's: 24GiB, or one of {', '.join(KNOWN)}; repeatable",
    )
    parser.add_argument("--workload", metavar="BxP+N", default="1x128+32", help="batch x prompt + new tokens")
    parser.add_argument("--bandwidth", metavar="SIZE", help="bytes per second at which files are read, such as 2GiB")
    parser.add_argument(
        "--layers", metavar="N", type=_layers, help="plan the first N layers of each kind, as --llm-layers loads them"
    )
    parser.add_argument(
        "--measured",
        metavar="SOURCE",
        action="append",
        default=[],
        help="extrapolate from cuts measured with --llm-layers: a report, baseline folder or git revision; repeatable",
    )
    parser.add_argument("--places", action="store_true", help="also print the place of each block")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the plan; return 1 if no strategy fits, else 0."""
    try:
        Workload.parse(options.workload)
        bandwidth = parse_bytes(options.bandwidth) if options.bandwidth else 0
        gpus = [_gpu(text, index) for index, text in enumerate(options.gpu)] or list(visible_gpus()[0])
    except (ValueError, MachineError) as error:
        raise CommandRefused(str(error)) from None
    if not gpus:
        raise CommandRefused("this machine does not have a GPU: name one to plan for, as in --gpu 24GiB or --gpu h100")
    cuts = read_cuts(_model(options.model).name, options.measured) if options.measured else {}
    told = ask(
        options.model,
        gpus,
        options.workload,
        trusted=options.trust_remote_code,
        measure=not bandwidth,
        layers=options.layers,
        cuts=sorted({count for measured in cuts.values() for count in measured}),
        measured=measured_cuts.ways(cuts),
    )
    told["bandwidth"] = bandwidth or told["bandwidth"]
    planned = {slug: {int(count): size for count, size in sizes.items()} for slug, sizes in told["weights"].items()}
    told["measured"] = measured_cuts.at(cuts, told["layers"], planned)
    if options.json:
        print(json.dumps(told, indent=1, sort_keys=True))
    else:
        print("\n".join(lines(told, gpus, options.workload, with_places=options.places)))
        print("\n".join(measured_cuts.lines(told["measured"], told["layers"])), end="\n" if cuts else "")
    return 0 if any(way["fits"] for way in told["overview"]["ways"]) else 1


def _layers(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of layers; write a whole number, as in 4")
    return int(text)


def _model(text: str) -> Model:
    """Return the model that an argument names. Raises CommandRefused."""
    try:
        return parse_model(text, Path.cwd())
    except ValueError as error:
        raise CommandRefused(str(error)) from None


def _gpu(text: str, index: int) -> Gpu:
    total = KNOWN[text.lower()] << 20 if text.lower() in KNOWN else parse_bytes(text)
    return Gpu(f"planned-{index}", text, total, (8, 0), index)


def ask(
    model: str,
    gpus: list[Gpu],
    workload: str,
    *,
    trusted: bool,
    measure: bool,
    layers: int | None = None,
    cuts: Sequence[int] = (),
    measured: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the planning process's answer. Raises CommandRefused with the process's one sentence."""
    question = {
        "model": _model(model).spec,
        "layers": layers,
        "cuts": list(cuts),
        "measured": measured or {},
        "gpus": [asdict(gpu) for gpu in gpus],
        "workload": workload,
        "trust_remote_code": trusted,
        "measure": measure,
    }
    command = [sys.executable, "-m", "pytest_llmload.process.planning"]
    try:
        done = subprocess.run(
            command, input=json.dumps(question), capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise CommandRefused(f"planning {model} took more than {_TIMEOUT:g} s") from None
    if done.returncode or not done.stdout.strip():
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise CommandRefused(f"the planning process ended with status {done.returncode}: {last}")
    # Libraries may print before the answer, which is the last line.
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in told:
        raise CommandRefused(told["error"])
    return told


def lines(told: dict[str, Any], gpus: list[Gpu], workload: str, *, with_places: bool) -> list[str]:
    """Return the plan as lines of text."""
    found = told["overview"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["cache_kinds"].items())
    sizes = ", ".join(f"{gpu.name} ({format_bytes(gpu.total)})" for gpu in gpus)
    constant = f" and {format_bytes(found['cache_constant'])} a sequence" if found["cache_constant"] > 0 else ""
    head = [
        f"{found['model_type']}, {counted(told['layers'], 'layer')}, {found['parameters'] / 1e9:.2f} B weights; "
        f"planned for {sizes}",
        f"cache: {kinds} layers, {format_bytes(found['cache_per_token'])} a token{constant}",
    ]
    if unknown := found["cache_kinds"].get("unknown"):
        head.append(
            f"the cache of {counted(unknown, 'layer')} is of a kind that is not known here: contexts are upper bounds"
        )
    title = ("strategy", "GPU", "host", "disk", f"cache {workload}", "fits", "longest", "largest batch", "load")
    rows = [title, *(_row(way, _seconds(told), found["context"]) for way in found["ways"])]
    notes = [f"  {way['slug']}: {way['problem']}" for way in found["ways"] if way["problem"]]
    if with_places:
        notes += [
            f"  {way['slug']}: {place}: {blocks}" for way in found["ways"] for place, blocks in way["places"].items()
        ]
    source = f"reading at {format_bytes(told['bandwidth'])}/s" if told["bandwidth"] else "--bandwidth tells load times"
    if told["download"]:
        notes.append(f"  the first load downloads {format_bytes(told['download'])}")
    kept = f"contexts keep {CONTEXT >> 20} MiB for CUDA and a prefill's intermediate results"
    return [*head, *columns(rows), *notes, f"planned in {format_seconds(told['seconds'])}; {source}; {kept}"]


def _seconds(told: dict[str, Any]) -> float:
    """Return the seconds to read the files, or 0 if the bandwidth is not known.

    The files hold what the first way loads; weights that are quantised during the load are read at full size.
    """
    first = told["overview"]["ways"][0]["figures"]
    size = told["stored"] or first.get("weights.logical", 0)
    return float(size / told["bandwidth"]) if told["bandwidth"] else 0.0


def _row(way: dict[str, Any], seconds: float, context: int) -> tuple[str, ...]:
    if way["problem"]:
        return (way["slug"], *("-",) * 4, "not planned", "-", "-", "-")
    figures = way["figures"]
    longest = f"{way['tokens']:,}" if way["tokens"] else "-"
    if context and way["tokens"] > context:
        longest = f"{context:,} (the model's)"
    return (
        way["slug"],
        format_bytes(figures["gpu.settled"]),
        format_bytes(figures["host.weights"]) if figures["host.weights"] else "-",
        format_bytes(figures["disk"]) if figures["disk"] else "-",
        format_bytes(way["cache"]),
        "yes" if way["fits"] else "no",
        longest,
        f"{way['batch']:,}" if way["batch"] else "-",
        f"from {format_seconds(seconds)}" if seconds else "-",
    )
