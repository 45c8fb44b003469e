"""Tensors of weight files are read by name, whole or sliced, and converted to the requested dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.errors import CheckpointError
from models.weights import Weights, load_module


def write(path: Path, **tensors: torch.Tensor) -> Path:
    """Write a safetensors file."""
    save_file(tensors, path)
    return path


def test_a_part_equals_the_slice_of_the_whole_tensor(tmp_path: Path) -> None:
    """A rank of a worker group reads rows or columns of a matrix."""
    matrix = torch.arange(12.0).reshape(3, 4)
    with Weights("dit", [write(tmp_path / "a.safetensors", w=matrix)]) as weights:
        assert torch.equal(weights.read("w"), matrix)
        assert torch.equal(weights.read("w", (slice(1, 3),)), matrix[1:3])
        assert torch.equal(weights.read("w", (slice(None), slice(0, 2))), matrix[:, :2])


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.safetensors", w=torch.ones(1)) for name in "ab"]
    weights = Weights("dit", files)
    with pytest.raises(CheckpointError, match=r"dit: w is in two files; b\.safetensors is the second"):
        weights.__enter__()


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"x" * 64)
    weights = Weights("dit", [file])
    with pytest.raises(CheckpointError, match=r"dit: /.*/a\.safetensors cannot be read"):
        weights.__enter__()


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_tensors_are_converted_to_the_requested_dtype(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    bias, weight = torch.randn(2).to(stored), torch.randn(2, 3).to(stored)
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    file = write(tmp_path / "a.safetensors", bias=bias, weight=weight)
    load_module(module, "dit", [file], torch.device("cpu"), wanted)
    assert torch.equal(module.weight, weight.to(wanted))
    assert not module.training
