"""Find what would make a load fail before it starts, and name the command that mends it.

The exit status is 1 if there is an error; warnings do not count. With --model, the space that the model's files and its
offloaded weights need is compared with the free space of the disks.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from pytest_llmload.cli import plan
from pytest_llmload.cli.refused import CommandRefused
from pytest_llmload.core.job import Gpu
from pytest_llmload.core.presets import PREFIX
from pytest_llmload.core.spec import AS_STORED
from pytest_llmload.core.units import counted, parse_bytes
from pytest_llmload.host.doctor.disk import BUILT, HUB, TEMPORARY
from pytest_llmload.host.doctor.examination import examine
from pytest_llmload.host.doctor.finding import ERROR, FINE, WARNING, Finding
from pytest_llmload.host.settings.settings import default_cache

_SIGNS = {ERROR: "ERROR", WARNING: "warning", FINE: "ok"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--model", metavar="MODEL", help="the model to load: hub id, directory or random:PRESET")
    parser.add_argument("--needs", metavar="SIZE", help="bytes that the model's files take, instead of a plan's figure")
    parser.add_argument("--cache-dir", metavar="DIR", type=Path, help="--llm-cache-dir")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the findings; return 1 if there is an error, else 0. Raises CommandRefused."""
    try:
        cache = options.cache_dir or default_cache()
    except pytest.UsageError as error:
        raise CommandRefused(str(error)) from None
    found = examine(Path.cwd(), cache, _needs(options))
    if options.json:
        print(json.dumps([asdict(finding) for finding in found], indent=1, ensure_ascii=False))
    else:
        for finding in found:
            print("\n".join(_lines(finding)))
        counts = Counter(finding.level for finding in found)
        print(
            ", ".join(f"{count} {level}" if level == FINE else counted(count, level) for level, count in counts.items())
        )
    return 1 if any(finding.level == ERROR for finding in found) else 0


def _lines(finding: Finding) -> list[str]:
    mend = [f"         mend it: {finding.command}"] if finding.command else []
    return [f"{_SIGNS[finding.level]:<8} {finding.check}: {finding.message}", *mend]


def _needs(options: argparse.Namespace) -> dict[str, int]:
    """Return the bytes that loading the model writes, by place. Raises CommandRefused."""
    if options.needs:
        try:
            size = parse_bytes(options.needs)
        except ValueError as error:
            raise CommandRefused(str(error)) from None
        return {BUILT if (options.model or "").startswith(PREFIX) else HUB: size}
    if not options.model:
        return {}
    # Any GPU will do, since only the place of weights that do not fit on a GPU matters.
    gpu = Gpu("planned", "planned", 80 << 30, (8, 0))
    told = plan.ask(options.model, [gpu], "1x128+32", trusted=False, measure=False)
    ways = {way["slug"]: way["figures"] for way in told["overview"]["ways"] if not way["problem"]}
    needs = {TEMPORARY: int(max((figures.get("disk", 0) for figures in ways.values()), default=0))}
    if options.model.startswith(PREFIX):
        needs[BUILT] = int(ways.get(AS_STORED, {}).get("weights.logical", 0))
    else:
        needs[HUB] = told["download"]
    return needs
