"""Extrapolate the measurements of cuts of a model to the whole model: the last part of ``llmload plan``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_llmload.baselines.extrapolation import Extrapolated, extrapolate
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.cli import sources
from pytest_llmload.cli.refused import CommandRefused, columns
from pytest_llmload.core.cut_names import cut_name, split_name
from pytest_llmload.core.metrics import find
from pytest_llmload.core.units import counted, format_bytes

#: Device and strategy -> number of layers -> the recorded baseline.
Cuts = dict[tuple[str, str], dict[int, Baseline]]


def read_cuts(model: str, given: Sequence[str]) -> Cuts:
    """Return the cuts of a model in reports, baseline folders or git revisions, at least two sizes per strategy.

    Raises CommandRefused if there are none.
    """
    found: Cuts = {}
    for source in given:
        for place, baseline in sources.read(source, Path("baselines")).items():
            name, layers = split_name(place.model)
            if name == model and layers is not None:
                found.setdefault((place.device, place.slug), {})[layers] = baseline
    enough = {key: cuts for key, cuts in found.items() if len(cuts) > 1}
    if not enough:
        seen = sorted({layers for cuts in found.values() for layers in cuts})
        has = f"measures only cuts to {counted(seen[0], 'layer')}" if seen else "has no cut"
        raise CommandRefused(
            f"{', '.join(given)} {has} of {model}: extrapolating needs one strategy at two numbers of layers, as "
            f"--llm-layers=2 and --llm-layers=4 record them in {cut_name(model, 2)} and {cut_name(model, 4)}"
        )
    return enough


def ways(cuts: Cuts) -> dict[str, dict[str, Any]]:
    """Return what each measured way of loading sets in a LoadSpec, by its name."""
    return {slug: next(iter(measured.values())).spec for (_, slug), measured in cuts.items()}


def at(cuts: Cuts, layers: int, planned: Mapping[str, Mapping[int, int]]) -> list[dict[str, Any]]:
    """Return the metrics of each way of loading at ``layers``.

    ``planned`` are the bytes that each way's weights take at each number of layers, by plan. Raises CommandRefused if
    no layer adds any.
    """
    rows = []
    for (device, slug), measured in sorted(cuts.items()):
        first, last = min(measured), max(measured)
        if planned[slug][last] <= planned[slug][first]:
            raise CommandRefused(
                f"by plan, the weights take {format_bytes(planned[slug][first])} with {counted(first, 'layer')} of "
                f"each kind and as much with {last}, so these cuts do not tell what a layer adds"
            )
        found: list[Extrapolated] = extrapolate(measured, planned[slug], layers)
        metrics = {each.metric: {"value": each.value, "exact": each.exact} for each in found}
        rows.append({"device": device, "strategy": slug, "cuts": sorted(measured), "metrics": metrics})
    return rows


def lines(rows: Sequence[Mapping[str, Any]], layers: int) -> list[str]:
    """Return the extrapolation as lines of text for people: of the figures that gate, and of none that is noise."""
    text = []
    for row in rows:
        cuts = ", ".join(map(str, row["cuts"]))
        text.append(f"{row['strategy']} on {row['device']}, all {layers} layers as cuts to {cuts} tell:")
        shown = [
            (name, "exactly" if figure["exact"] else "about", format_bytes(figure["value"]))
            for name, figure in row["metrics"].items()
            if figure["value"] >= 0 and not ((metric := find(name)) and metric.informative)
        ]
        text += [f"  {line}" for line in columns(shown)]
    return text
