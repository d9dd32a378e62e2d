"""The tensors of a model: each is found once, where it is, and in its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loads import checkpoint, load
from torch._subclasses.fake_tensor import FakeTensorMode

from pytest_llmload.probes.other_tensors import storages
from pytest_llmload.worker.checkpoints.files import CheckpointFiles
from pytest_llmload.worker.checkpoints.names import CheckpointNames
from pytest_llmload.worker.model.quantisable import out_of_reach, quantisable
from pytest_llmload.worker.model.tensors import Inventory


class Odd(torch.nn.Module):  # type: ignore[misc]
    """Holds tensors where no parameter list looks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8, 4))
        self.register_buffer("kept", torch.zeros(3))
        self.register_buffer("derived", torch.zeros(5), persistent=False)
        self.tables = {"scales": [torch.zeros(7)], "view": self.weight.detach()[2:]}
        self.weight.extra = torch.zeros(11)
        self.placeholder = torch.nn.Parameter(torch.zeros(100, device="meta"))


def test_torchs_own_attention_is_out_of_reach() -> None:
    model = torch.nn.Module()
    model.attention = torch.nn.MultiheadAttention(64, 4)
    model.linear = torch.nn.Linear(64, 64)
    inventory = Inventory(model)
    assert [weight.name for weight in quantisable(model, inventory)] == ["linear.weight"]
    assert [held.path for held in out_of_reach(inventory)] == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]


def test_every_place_that_holds_a_tensor_is_found_once() -> None:
    inventory = Inventory(torch.nn.Sequential(Odd()))
    found = {held.path: (held.role, held.nbytes, held.persistent) for held in inventory.held}
    assert found == {
        "0.weight": ("parameter", 128, True),
        "0.weight.extra": ("state", 44, True),
        "0.placeholder": ("parameter", 400, True),
        "0.kept": ("buffer", 12, True),
        "0.derived": ("buffer", 20, False),
        "0.tables.scales.0": ("state", 28, True),
        "0.tables.view": ("state", 96, True),
    }
    assert sum(inventory.storages().values()) == 128 + 44 + 12 + 20 + 28


class EqualToAll(type):
    """The class of a class that compares equal to all others, and has no hash."""

    def __eq__(cls, other: object) -> bool:
        return True


class Kept(metaclass=EqualToAll):
    """What two modules share: it leads to a tensor in one way, and to none in another."""

    def __init__(self) -> None:
        self.settings = {"steps": [1, 2], "name": "shared"}
        self.table = torch.zeros(6)


def test_what_two_modules_share_is_found_in_both() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    kept = Kept()
    for module in model:
        module.settings, module.kept = kept.settings, kept
    assert [held.path for held in Inventory(model).held] == ["0.kept.table", "1.kept.table"]


def test_a_tensor_that_holds_no_values_has_no_storage() -> None:
    """As torch.compile leaves them behind: they name a device, and asking for their address raises."""
    with FakeTensorMode():
        fake = torch.zeros(8)
    assert fake.device.type == "cpu"
    for tensor in (fake, torch._to_functional_tensor(torch.zeros(8)), torch.zeros(8, device="meta")):
        assert storages(tensor) == []
    assert [size for _, size in storages(torch.zeros(8))] == [32]


def test_tied_weights_count_once_and_slices_of_a_storage_are_told_apart() -> None:
    whole = torch.zeros(10, 4)
    model = torch.nn.ModuleList([torch.nn.Linear(4, 5, bias=False) for _ in range(3)])
    model[0].weight = torch.nn.Parameter(whole[:5])
    model[1].weight = torch.nn.Parameter(whole[5:])
    model[2].weight = model[0].weight
    inventory = Inventory(model)
    assert sum(inventory.storages().values()) == 160
    assert sum(held.nbytes for held in inventory.distinct()) == 160
    model[1].weight = torch.nn.Parameter(torch.zeros(5, 4))
    inventory = Inventory(model)
    # The first half keeps the whole of its storage alive.
    assert sum(inventory.storages().values()) == 160 + 80
    assert sum(held.nbytes for held in inventory.distinct()) == 160


def test_weights_behind_hooks_are_found_where_they_are(tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    for offload, device in ((cpu_offload, "cpu"), (lambda model: disk_offload(model, str(tmp_path)), "disk")):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        offload(model)
        held = {item.path: item for item in Inventory(model).held}
        assert {item.device for item in held.values()} == {device}
        assert all(item.offloaded for item in held.values())
        assert sum(item.nbytes for item in held.values()) == 2 * (64 + 8) * 4
        assert (sum(Inventory(model).storages().values()) > 0) == (device == "cpu")


def test_blocks_of_a_file_are_those_of_the_tensor() -> None:
    from safetensors.torch import load_file

    files = CheckpointFiles(checkpoint("tiny-gpt2").path)
    (file,) = set(files.where.values())
    tensors = load_file(file)
    for name, tensor in tensors.items():
        size = tensor.numel()
        for start, stop in ((0, min(size, 70)), (max(0, size - 65), size), (size // 3, min(size, size // 3 + 100))):
            assert torch.equal(files.block(name, start, stop), tensor.reshape(-1)[start:stop]), name
            if tensor.dim() == 2:
                expected = tensor.T.reshape(-1)[start:stop]
                assert torch.equal(files.block(name, start, stop, transposed=True), expected), name


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gpt-neox", "tiny-gpt2", "tiny-mixtral"])
def test_every_tensor_of_a_model_is_found_in_its_checkpoint(model: str) -> None:
    _, loaded = load(model, measure=False)
    names = CheckpointNames(loaded.model, CheckpointFiles(checkpoint(model).path))
    used: set[str] = set()
    for held in loaded.inventory.distinct():
        if held.role != "parameter":
            continue
        name, fused = names.find(held.path), names.fused(held.path)
        assert name or fused, held.path
        used |= {name} if name else {part for parts in fused.parts for part in parts} if fused else set()
    assert used == set(names.files.where)
