"""Shards of weights: all shards of a tensor together hold the whole tensor."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.errors import CheckpointError
from models.parallel.mesh import Axis
from models.parallel.shards import Shard, parameter_shards
from models.parallel.tensor_parallel import ColumnParallelLinear, ParallelRMSNorm, RowParallelLinear
from models.weights import load_module

CPU = torch.device("cpu")


def test_a_shard_has_a_slice_of_each_part() -> None:
    whole = torch.arange(10.0)
    parts = [Shard(0, 2, index, (4, 6)).select(whole).tolist() for index in range(2)]
    assert parts == [[0, 1, 4, 5, 6], [2, 3, 7, 8, 9]]
    assert Shard(0, 2, 0, (4, 6)).whole_shape((5,)) == (10,)


def test_a_shard_of_columns_has_a_slice_of_each_part() -> None:
    whole = torch.arange(24.0).reshape(2, 12)
    shard = Shard(1, 3, 1, (3, 9))
    assert torch.equal(shard.select(whole), whole[:, [1, 6, 7, 8]])
    assert shard.whole_shape((2, 4)) == (2, 12)


def test_parts_that_are_not_divisible_by_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="parts: \\[3\\] are not multiples of 2"):
        Shard(0, 2, 0, (4, 3))


class Layers(nn.Module):
    """One of each parallel layer, or the single-device layers that they replace."""

    def __init__(self, axis: Axis | None) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(4, (8,), axis) if axis else nn.Linear(4, 8)
        self.down = RowParallelLinear((8, 16), 4, axis) if axis else nn.Linear(24, 4)
        self.norm = ParallelRMSNorm(8, axis, 1e-6) if axis else nn.RMSNorm(8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    save_file({name: torch.randn_like(value) for name, value in Layers(None).state_dict().items()}, path)
    return path


def load_rank(file: Path, index: int, ranks: int) -> Layers:
    """The layers of one of `ranks` ranks."""
    with torch.device("meta"):
        layers = Layers(Axis(ranks, index))
    load_module(layers, "dit", [file], CPU, torch.float32)
    return layers


def test_ranks_read_only_their_shards(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = Layers(None)
    load_module(whole, "dit", [file], CPU, torch.float32)
    caplog.set_level(logging.INFO)
    for index in range(4):
        layers = load_rank(file, index, 4)
        shards = parameter_shards(layers)
        assert shards.keys() == {"up.weight", "up.bias", "down.weight", "norm.weight"}
        for name, value in whole.state_dict().items():
            expected = shards[name].select(value) if name in shards else value
            assert torch.equal(layers.state_dict()[name], expected), name
    # 8 x 4 + 8, 4 x 24 and 8 elements are sharded over four ranks; 4 elements are replicated.
    gigabytes = f"gigabytes={(144 / 4 + 4) * 4 / 1e9:g} "
    assert [gigabytes in line for line in caplog.messages] == [True] * 4


def test_a_whole_tensor_of_another_shape_is_refused(file: Path) -> None:
    with torch.device("meta"):
        layers = Layers(Axis(2, 0))
    layers.up = ColumnParallelLinear(4, (16,), Axis(2, 0))
    with pytest.raises(CheckpointError, match=r"up\.weight: shape \[8, 4\] is not \[16, 4\]"):
        load_module(layers, "dit", [file], CPU, torch.float32)


def test_gathering_a_layer_of_several_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="2 parts cannot be gathered"):
        ColumnParallelLinear(4, (4, 4), Axis(2, 0), gather=True)
