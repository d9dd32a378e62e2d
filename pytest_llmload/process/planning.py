"""Answer ``llmload plan``: a process that may import torch reads one question from its input and prints the answer."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmload.core.errors import LoadFailed, MachineError
from pytest_llmload.core.job import Device, Gpu
from pytest_llmload.core.presets import PREFIX
from pytest_llmload.core.spec import Workload
from pytest_llmload.strategies.builtin import BUILTIN
from pytest_llmload.system.disk_speed import read_speed
from pytest_llmload.system.garbage import collected_rarely

if TYPE_CHECKING:
    from pytest_llmload.worker.planning.overview import Asked


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Return the overview of a model, with the seconds of planning, and the disk's speed if the weights are local.

    It also has the number of layers, the bytes that a load would download, and of each way of loading in ``measured``
    the bytes of the weights at each number of layers that ``cuts`` names.

    Raises ValueError, LoadFailed or MachineError, each with one sentence.
    """
    from pytest_llmload.worker.checkpoints.hub import download_size
    from pytest_llmload.worker.checkpoints.layer_counts import layer_count
    from pytest_llmload.worker.checkpoints.weights import weight_files
    from pytest_llmload.worker.parallel.planned import parallel_ways
    from pytest_llmload.worker.planning.overview import cut_folder, outline, overview, stored_bytes, weights_in

    gpus = tuple(Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in question["gpus"])
    model, trusted, layers = question["model"], question["trust_remote_code"], question["layers"]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:

        def cut(count: int | None) -> Path:
            if count is None or count == whole_count:
                return whole
            target = Path(folder) / f"{count}-layers"
            target.mkdir(exist_ok=True)
            return (
                target if any(target.iterdir()) else cut_folder(model, whole, count, target, trust_remote_code=trusted)
            )

        (Path(folder) / "whole").mkdir()
        whole = outline(model, Path(folder) / "whole", trust_remote_code=trusted)
        whole_count = layer_count(whole, trust_remote_code=trusted)
        directory, workload = cut(layers), Workload.parse(question["workload"])
        found = overview(model, directory, gpus, workload, ways(gpus), trust_remote_code=trusted)
        split = parallel_ways(model, directory, gpus, workload, trust_remote_code=trusted)
        found = dataclasses.replace(found, ways=(*found.ways, *split))
        counts = {layers or whole_count, *question["cuts"]} if question["cuts"] else ()
        weights = {
            slug: {count: weights_in(cut(count), fields, trust_remote_code=trusted) for count in counts}
            for slug, fields in question["measured"].items()
        }
        seconds = time.perf_counter() - begin
        is_of_hub = not model.startswith(PREFIX) and not Path(model).expanduser().is_dir()
        download = download_size(model, whole, trust_remote_code=trusted, layers=layers) if is_of_hub else 0
        stored = stored_bytes(directory)
        speed = read_speed(weight_files(whole)) if stored and question["measure"] else 0.0
    return {
        "overview": asdict(found),
        "seconds": seconds,
        "stored": stored,
        "download": download,
        "bandwidth": speed,
        "layers": layers or whole_count,
        "weights": weights,
    }


def ways(gpus: tuple[Gpu, ...]) -> list[Asked]:
    """Return what the ready-made suite loads without being asked and the planner can predict, by the declarations.

    On several GPUs, each map over all of them too, and the first of these maps with each quantisation.
    """
    from pytest_llmload.worker.planning.overview import Asked

    device = Device("cuda", "planned", gpus)
    loaded = [each for each in BUILTIN.values() if not each.why_not_by_default(device) and "adapter" not in each.fields]
    whole = next(each.placement for each in loaded if each.placement is not None and not each.placement.divides)
    found = []
    for each in loaded:
        placement = each.placement or (whole if "strategy" not in each.fields else None)
        if placement is not None and not each.is_device_map:
            found += [Asked(fields, placement) for fields in (each.fields, *each.also)]
    maps = [(each.fields, each.placement) for each in loaded if each.is_device_map and each.placement is not None]
    if len(gpus) > 1:
        quantised = [(maps[0][0] | each.fields, maps[0][1]) for each in loaded if "quant" in each.fields]
        found += [Asked(fields, placement, len(gpus)) for fields, placement in (*maps, *quantised)]
    return found


def main() -> int:
    """Answer the question on the standard input; an error is printed as an answer too."""
    try:
        # It imports torch and transformers, and keeps the models that it builds for a moment only.
        with collected_rarely():
            told: dict[str, Any] = answer(json.load(sys.stdin))
    except (ValueError, ImportError, LoadFailed, MachineError, OSError) as error:
        told = {"error": next(iter(str(error).splitlines()), type(error).__name__)}
    print(f"\n{json.dumps(told)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
