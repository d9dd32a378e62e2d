"""From a SPEC to files: random models, directories, and a hub that answers, refuses or is away."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, Hub, serving

from pytest_llmload.core.errors import LoadFailed, MachineError
from pytest_llmload.core.presets import PRESETS
from pytest_llmload.worker.checkpoints.build import build, write_weights
from pytest_llmload.worker.checkpoints.headers import INDEX, read_index
from pytest_llmload.worker.checkpoints.hub import split_id
from pytest_llmload.worker.checkpoints.random_adapter import resolve_adapter
from pytest_llmload.worker.checkpoints.resolve import resolve
from pytest_llmload.worker.checkpoints.weights import read_tensors

Ask = Callable[..., dict[str, Any]]
SECRET = "hf_thisIsNobodysToken123"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def built(cache: Path) -> Path:
    return build(PRESETS["tiny-llama"], "tiny-llama", cache)


def test_a_random_model_is_built_and_identified(cache: Path, built: Path) -> None:
    found = resolve("random:tiny-llama", cache)
    assert found.path == str(built)
    assert found.model_type == "llama"
    assert found.bytes == (built / "model.safetensors").stat().st_size
    assert re.fullmatch("[0-9a-f]{16}", found.shape)
    assert re.fullmatch("[0-9a-f]{16}", found.weights)
    assert found == resolve("random:tiny-llama", cache)
    assert found.weights != resolve("random:tiny-gpt-neox", cache).weights


def test_the_same_config_by_path_is_the_same_model(cache: Path, tmp_path: Path) -> None:
    preset = resolve("random:tiny-llama", cache)
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["tiny-llama"]))
    own = resolve(f"random:{tmp_path / 'config.json'}", cache)
    assert (own.shape, own.weights) == (preset.shape, preset.weights)


def test_a_directory_is_itself(cache: Path, built: Path) -> None:
    found = resolve(str(built), cache)
    assert found.path == str(built)
    assert found.shape == resolve("random:tiny-llama", cache).shape
    assert found.revision == ""


@pytest.mark.parametrize(
    ("files", "said"),
    [({"adapter_config.json": "{}"}, "name it with --llm-adapter"),
     ({"config.json": "{"}, "cannot be read: it is not valid JSON"), ({"config.json": "3"}, "contain a JSON object")],
)  # fmt: skip
def test_a_directory_that_is_no_checkpoint_is_said(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(LoadFailed, match=said):
        resolve(str(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_checkpoint_of_our_own_cache_is_no_fault_of_the_model(name: str, tmp_path: Path) -> None:
    own = Path(resolve("random:tiny-llama", tmp_path).path)
    (own / name).write_bytes((own / name).read_bytes()[:100])
    with pytest.raises(MachineError, match=f"{own} has been damaged since it was built; delete that folder"):
        resolve("random:tiny-llama", tmp_path)
    shutil.rmtree(own)
    assert resolve("random:tiny-llama", tmp_path).path == str(own)


def test_a_cache_that_cannot_be_written_is_the_machines_fault(built: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="--llm-cache-dir"):
        resolve("random:tiny-llama", tmp_path / "file")
    with pytest.raises(MachineError, match="--llm-cache-dir"):
        resolve(str(built), tmp_path / "file")


@pytest.mark.parametrize("spec", ["", ".", "/no/such/directory", "./models/x", "a/b/c", "org/model@", "@v1", "a b"])
def test_what_can_be_no_hub_id_is_said(spec: str) -> None:
    with pytest.raises(ValueError, match="neither a directory here nor a hub id"):
        split_id(spec)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("gpt2", ("gpt2", "")),
        ("org/model-7b.v1", ("org/model-7b.v1", "")),
        ("org/m@refs/pr/1", ("org/m", "refs/pr/1")),
        ("org/m@v1.0", ("org/m", "v1.0")),
    ],
)
def test_a_hub_id_is_split_from_its_revision(spec: str, parts: tuple[str, str]) -> None:
    assert split_id(spec) == parts


@pytest.fixture
def hub(built: Path) -> Iterator[str]:
    Hub.files = {path.name: path.read_bytes() for path in built.iterdir()}
    Hub.files |= {
        "pytorch_model.bin": b"pickled",
        "consolidated.safetensors": b"the same weights again",
        "onnx/model.onnx": b"another format",
        "original/params.json": b"{}",
        "modeling_custom.py": b"raise SystemExit",
        "README.md": b"text",
    }
    Hub.asked = []
    with serving() as address:
        yield address


#: Bytes and folder of each download that the last :func:`ask` told of before it began.
TOLD: list[list[Any]] = []


def ask_of(python: str | Path, spec: str, cache: Path, home: Path, **env: str) -> dict[str, Any]:
    """``resolve`` in a process of its own: the hub's client reads its environment when it is imported.

    If ``again``, the process resolves it offline too, and finds the same.
    """
    code = (
        "import dataclasses, json, sys\nfrom pathlib import Path\n"
        "from pytest_llmload.core.errors import MachineError\n"
        "from pytest_llmload.worker.checkpoints.resolve import resolve\n"
        "try:\n"
        "    layers = int(sys.argv[4]) or None\n"
        "    told = []\n"
        "    tell = lambda size, folder: told.append([size, str(folder)])\n"
        "    trusted = bool(sys.argv[3])\n"
        "    found = resolve(sys.argv[1], Path(sys.argv[2]), trust_remote_code=trusted, layers=layers, tell=tell)\n"
        "    found = dataclasses.asdict(found)\n"
        "    if sys.argv[5]:\n"
        "        from huggingface_hub import constants\n"
        "        constants.HF_HUB_OFFLINE = True\n"
        "        again = resolve(sys.argv[1], Path(sys.argv[2]), trust_remote_code=trusted, layers=layers)\n"
        "        assert dataclasses.asdict(again) == found, again\n"
        "    print(json.dumps(told))\n"
        "except (MachineError, ValueError) as error:\n"
        "    found = {'error': type(error).__name__, 'message': str(error)}\n"
        "print(json.dumps(found))"
    )
    arguments = [spec, str(cache), env.pop("trust", ""), env.pop("layers", "0"), env.pop("again", "")]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": SECRET,
        "no_proxy": "127.0.0.1",
        **env,
    }
    command = [python, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    *_, told, last = ["[]", *done.stdout.splitlines()]
    found: dict[str, Any] = json.loads(last)
    if "error" not in found:
        TOLD[:] = json.loads(told)
    return found


@pytest.fixture
def ask(forked_python: Path) -> Ask:
    """Return :func:`ask_of` in processes that are forked: some of them need torch and transformers."""
    return partial(ask_of, forked_python)


def test_a_hub_model_is_downloaded_without_what_no_load_reads(
    hub: str, cache: Path, built: Path, tmp_path: Path
) -> None:
    found = ask_of(sys.executable, "org/model@v1", cache, tmp_path, HF_ENDPOINT=hub)
    assert found.get("revision") == COMMIT, found
    assert found["shape"] == resolve(str(built), cache).shape
    assert found["weights"] == resolve(str(built), cache).weights
    assert set(Hub.asked) == {path.name for path in built.iterdir()}
    blobs = tmp_path / "hub" / "models--org--model" / "blobs"
    assert [[(built / "model.safetensors").stat().st_size, str(blobs)]] == TOLD
    offline = ask_of(sys.executable, "org/model@v1", cache, tmp_path, HF_HUB_OFFLINE="1")
    assert offline == found
    assert not TOLD


def test_a_download_that_would_fill_the_disk_is_refused_before_it_begins(
    ask: Ask, hub: str, cache: Path, tmp_path: Path
) -> None:
    Hub.sizes = {"model.safetensors": 1 << 60}
    found = ask("org/model", cache, tmp_path, HF_ENDPOINT=hub)
    assert found["error"] == "MachineError"
    assert re.fullmatch(
        rf"the download of org/model needs 1048576\.00 TiB in {tmp_path}/hub/models--org--model, where .* are free; "
        "make room or name a different folder with HF_HOME",
        found["message"],
    )
    assert "config.json" in Hub.asked
    assert "model.safetensors" not in Hub.asked


def test_remote_code_is_downloaded_only_when_it_is_trusted(ask: Ask, hub: str, cache: Path, tmp_path: Path) -> None:
    assert "error" not in ask("org/model", cache, tmp_path, HF_ENDPOINT=hub, trust="1")
    assert "modeling_custom.py" in Hub.asked


def test_a_sharded_hub_model_is_downloaded_by_its_index(ask: Ask, hub: str, cache: Path, tmp_path: Path) -> None:
    weights = Hub.files.pop("model.safetensors")
    Hub.files["model-1-of-1.safetensors"] = weights
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-1-of-1.safetensors"}}
    Hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    found = ask("org/model", cache, tmp_path, HF_ENDPOINT=hub)
    assert found.get("revision") == COMMIT, found
    assert "model-1-of-1.safetensors" in Hub.asked
    assert "consolidated.safetensors" not in Hub.asked


def test_of_a_hub_model_that_is_cut_only_the_files_of_its_layers_are_downloaded(
    ask: Ask, hub: str, cache: Path, built: Path, tmp_path: Path
) -> None:
    del Hub.files["model.safetensors"]
    write_weights(tmp_path, read_tensors(built), shard_bytes=4 << 20)
    Hub.files |= {path.name: path.read_bytes() for path in tmp_path.glob("model*")}
    found = ask("org/model", cache, tmp_path, HF_ENDPOINT=hub, layers="1", again="yes")
    assert found.get("revision") == COMMIT, found
    last = {file for name, file in read_index(tmp_path / INDEX).items() if name.startswith("model.layers.2.")}
    first = {file for name, file in read_index(tmp_path / INDEX).items() if ".layers." not in name or ".0." in name}
    assert last - first
    assert not (last - first) & set(Hub.asked)
    assert first <= set(Hub.asked)


def test_a_hub_model_without_weights_is_said(ask: Ask, hub: str, cache: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin"):
        del Hub.files[name]
    found = ask("org/model", cache, tmp_path, HF_ENDPOINT=hub)
    assert found["error"] == "MachineError"
    assert "org/model of the hub has no model.safetensors, no pytorch_model.bin and no" in found["message"]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_hub_model_of_pickled_files(ask: Ask, parts: int, hub: str, cache: Path, tmp_path: Path) -> None:
    import torch

    del Hub.files["model.safetensors"], Hub.files["pytorch_model.bin"]
    names = [f"pytorch_model-{part}-of-{parts}.bin" for part in range(parts)] if parts > 1 else ["pytorch_model.bin"]
    for name in names:
        torch.save({f"{name}.weight": torch.ones(4)}, tmp_path / name)
        Hub.files[name] = (tmp_path / name).read_bytes()
    if parts > 1:
        index = {"metadata": {}, "weight_map": {f"{name}.weight": name for name in names}}
        Hub.files["pytorch_model.bin.index.json"] = json.dumps(index).encode()
    found = ask("org/model", cache, tmp_path / "home", HF_ENDPOINT=hub)
    assert found.get("revision") == COMMIT, found
    assert set(names) <= set(Hub.asked)
    assert found["bytes"] == sum((tmp_path / name).stat().st_size for name in names)


@pytest.mark.parametrize(
    ("files", "said"),
    [({}, "no config.json: it is not a transformers"), ({"config.json": "{}"}, "has no model.safetensors"),
     ({"config.json": "{}", "consolidated.00.pth": "x"}, "but consolidated.00.pth")],
)  # fmt: skip
def test_what_only_the_users_own_loader_may_load(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    found = resolve(str(tmp_path), tmp_path / "cache")
    assert said in found.unreadable
    (tmp_path / "consolidated.00.pth").write_text("other")
    assert resolve(str(tmp_path), tmp_path / "cache").weights != found.weights


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("org/gated", "the model is gated; accept its terms"),
        ("org/missing", "the hub has no such model"),
        ("org/model@v9", "the model has no such revision"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    ask: Ask, spec: str, said: str, hub: str, cache: Path, tmp_path: Path
) -> None:
    found = ask(spec, cache, tmp_path, HF_ENDPOINT=hub)
    assert found["error"] == "MachineError"
    assert found["message"].startswith(f"cannot download {spec}: ")
    assert said in found["message"]
    assert "\n" not in found["message"]


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_a_hub_that_is_away_is_one_sentence(ask: Ask, env: dict[str, str], cache: Path, tmp_path: Path) -> None:
    found = ask("org/model", cache, tmp_path, **env)
    assert found["error"] == "MachineError"
    assert found["message"].startswith("cannot download org/model: ")
    assert "\n" not in found["message"]


def test_an_incomplete_cache_offline_is_one_sentence(ask: Ask, cache: Path, built: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    shutil.copy(built / "config.json", snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    found = ask("org/model", cache, tmp_path, HF_HUB_OFFLINE="1")
    assert found["error"] == "MachineError"
    assert "org/model" in found["message"]
    assert "\n" not in found["message"]


def test_adapters_are_resolved_like_models(cache: Path, tmp_path: Path) -> None:
    checkpoint = resolve("random:tiny-llama", cache)
    made = resolve_adapter("random", checkpoint, cache)
    assert resolve_adapter(str(made), checkpoint, cache) == made
    with pytest.raises(LoadFailed, match=r"not a PEFT adapter in safetensors: it has no adapter_config.json and no"):
        resolve_adapter(str(tmp_path), checkpoint, cache)
    with pytest.raises(ValueError, match="nor a hub id"):
        resolve_adapter("/no/such/adapter", checkpoint, cache)
