"""FLUX.2 klein through real services gives the bytes of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from local_fleet import LocalFleet
from models.catalog import open_model
from models.registry import load_registry
from served_fleet import served_fleet
from tiny_flux2 import build_tiny_flux2_klein


def test_tensors_are_those_of_one_process(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = open_model(f"klein={build_tiny_flux2_klein(tmp_path / 'klein')}", load_registry())
    given: dict[str, Any] = {"prompt": "a red apple", "height": 32, "width": 48, "num_inference_steps": 2, "seed": 5}
    local = LocalFleet(model)
    expected = local.tensors(**given)
    local.close()
    with served_fleet([model]) as fleet:
        got = fleet.generate("klein", **given).tensors
    assert got.keys() == expected.keys() == {"latents", "pixels"}
    assert all(torch.equal(got[name], expected[name]) for name in expected)
