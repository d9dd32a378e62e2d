"""docs/architectures.md, from the rows of ``architectures.py``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

_STRATEGIES = ("fp32", "bf16", "nf4", "int8", "lora", "offload")
_SHARE = re.compile(r"only ([\d.]+) % of the quantisable")
#: What a message says where it is a library's own code that leaves the adapter out.
_OF_THE_LIBRARY = ("the model's own code does not use these", "PEFT renames them")
_HEAD = """# Architectures

What the plugin says about tiny random models of the architectures that transformers maps for causal and masked language
models, sequence to sequence, image and text, classification and speech. `python benchmarks/architectures.py` measures
them on a CPU, with `--device cuda` on a GPU, and writes this page. A bare script without the plugin checks first that
the library can build, save, load and run a model; each strategy is then recorded and gated. Shares are of a tiny model
and differ from those of a real one.

CPU: {versions}. The bare script runs {run} of {mapped} model types; {measured} types are measured or do not run.

{gpu_versions}

| strategy | applied, recorded and gated | finding about a library | other |
| --- | --- | --- | --- |
{summary}

- `ok`: applied, recorded, and gated without a difference.
- A percentage: that share of the quantisable weights is quantised, and the rest is dense; why is in the last column.
- `does not run`: the library's own code raises under that strategy. A bare script gets no further with vibevoice, which
  needs diffusers, with pop2piano, whose settings of generation must name composers, and with dbrx and jetmoe offloaded:
  their modules read the weights of others, and accelerate loads a module's weights only for its own forward.
- `offloaded`: longcat_flash runs offloaded, and its router computes with memory as it was found in place of a weight
  that accelerate has not loaded: torch's `linear` of a CPU tensor and a meta weight raises nothing.
- The column of a GPU says what it was there, in the order bf16, nf4, int8, where that is not what it was on the CPU;
  `same` where it is; nothing where the type was not measured there.

| type | family | {strategies} | on the GPU | what stays dense, or does not run |
| --- | --- |{rule} --- | --- |
{rows}

## Planted faults

`python benchmarks/architectures.py --faults 24` plants three faults in the load of types of all families whose clean
load is right, each on the largest `nn.Linear` that is not the output head. None of them has a baseline. Few types are
mapped for classification or speech alone: others stand for these families too, loaded by the class for that family.

{planted}

## Types that the bare script runs, not measured yet

{unmeasured}

## Types that the bare script does not run

With the tiny configuration that `benchmarks/tiny_configs.py` makes. Most fail in the library itself: an auto class
that does not load what its model saves or takes the config of a part, a package that is missing here, a draft model
that reads the cache of a different one. The others need an input that the workload does not make: pi0 the state of a
robot, dia and kyutai_speech_to_text codes of sound, several at each position.

| type | family | error |
| --- | --- | --- |
{broken}
"""


def page(
    rows: Iterable[dict[str, Any]], on_gpu: dict[str, dict[str, Any]], mapped: int, planted: list[dict[str, Any]]
) -> str:
    """Return the page, from the rows of a CPU, by type those of a GPU, and those of planted faults."""
    rows = sorted(rows, key=lambda row: row["type"])
    run = [row for row in rows if "strategies" in row]
    left = [row for row in rows if row not in run and "forward" in row["bare"]["steps"]]
    counts = {name: Counter(_word(row["strategies"][name]) for row in run) for name in _STRATEGIES}
    return _HEAD.format(
        versions=_versions(rows),
        gpu_versions=f"GPU: {_versions(on_gpu.values())}. {len(on_gpu)} types are measured." if on_gpu else "",
        measured=len(rows) - len(left),
        mapped=mapped,
        run=len(run) + len(left),
        planted=_planted(planted),
        unmeasured=", ".join(f"`{row['type']}`" for row in left) or "None.",
        summary="\n".join(
            f"| `{name}` | {counts[name]['ok']} | {counts[name]['finding']} | {counts[name]['other']} |"
            for name in _STRATEGIES
        ),
        strategies=" | ".join(f"`{name}`" for name in _STRATEGIES),
        rule=" --- |" * len(_STRATEGIES),
        rows="\n".join(_row(row, on_gpu.get(row["type"], {})) for row in run),
        broken="\n".join(
            f"| {row['type']} | {row['family']} | {_cell(row['bare']['error'])} |"
            for row in rows
            if row not in run and row not in left
        ),
    )


def _word(found: dict[str, Any]) -> str:
    if found["verdict"] == "right":
        return "ok"
    texts = [problem[1] for problem in found.get("problems", ())] or [found.get("because", "")]
    checks = {problem[0] for problem in found.get("problems", ())}
    if found["verdict"] == "refused" or any(cause in text for cause in _OF_THE_LIBRARY for text in texts):
        return "finding"
    return "finding" if checks and checks <= {"quantised", "forward", "generate", "finite", "offloaded"} else "other"


def _versions(rows: Iterable[dict[str, Any]]) -> str:
    """Return all versions of each library that rows were measured with."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, number in row["versions"].items():
            found.setdefault(name, set()).add(number)
    return ", ".join(f"{name} {' and '.join(sorted(numbers))}".removeprefix("GPU ") for name, numbers in found.items())


def _row(row: dict[str, Any], on_gpu: dict[str, Any]) -> str:
    cells = [_short(row["strategies"][name]) for name in _STRATEGIES]
    cells.append(_beside(row, on_gpu))
    reasons = dict.fromkeys(
        _reason(problem)
        for name in _STRATEGIES
        for problem in row["strategies"][name].get("problems") or _refusal(row["strategies"][name])
    )
    return f"| {row['type']} | {row['family']} | {' | '.join(cells)} | {_cell('; '.join(reasons))} |"


def _planted(rows: list[dict[str, Any]]) -> str:
    """Return how many types each fault was planted in, where it was caught, and what is said of it."""
    lines = ["| planted | types | caught | what it is called |", "| --- | --- | --- | --- |"]
    for fault in dict.fromkeys(row["fault"] for row in rows):
        said = [row["said"] for row in rows if row["fault"] == fault]
        told = next((text for text in said if text), "")
        lines.append(f"| {fault} | {len(said)} | {sum(map(bool, said))} | {_cell(told)} |")
    families: dict[str, list[str]] = {}
    for row in rows:
        if row["type"] not in families.setdefault(row["family"], []):
            families[row["family"]].append(row["type"])
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {name}: {', '.join(types)}" for name, types in families.items())


def _refusal(found: dict[str, Any]) -> list[list[Any]]:
    """Return why no load was made, as a problem; a checkpoint's place is left out."""
    text = re.sub(r"^ValueError: \S+ | \(\w+\.py:\d+\)$", "", found.get("because", ""))
    return [["refused", f"it {text}", []]] if found["verdict"] == "refused" else []


def _beside(row: dict[str, Any], on_gpu: dict[str, Any]) -> str:
    """Return how a type fared on the GPU beside the CPU."""
    found = on_gpu.get("strategies", {})
    if not found:
        return str(on_gpu.get("bare", {}).get("error", ""))
    words = {name: _short(one) for name, one in found.items()}
    same = all(word == _short(row["strategies"][name]) for name, word in words.items())
    return "same" if same else ", ".join(words.values())


def _short(found: dict[str, Any]) -> str:
    if found["verdict"] == "right":
        return "ok"
    problems = found.get("problems", ())
    texts = [message for _, message, _ in problems]
    if any(check in ("forward", "generate") for check, _, _ in problems):
        return "does not run"
    share = next((match[1] for text in texts if (match := _SHARE.search(text))), "")
    if share:
        return f"{share} %"
    if any(text.startswith("nothing was quantised") for text in texts):
        return "nothing"
    return str(problems[0][0] if problems else found["verdict"])


def _reason(problem: list[Any]) -> str:
    _, message, names = problem
    where = re.sub(r"\.\d+\.", ".*.", names[0].partition(" ")[0]) if names else ""
    text = re.sub(r"^(only [\d.]+ % of the quantisable weights are \w+|nothing was quantised to \w+): ", "", message)
    text = re.sub(r"^\d+ weights? \([^)]*\) dense: ", "", text)
    return f"`{where}`: {text}" if where else text


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:320]
