"""FLUX.2 klein through real services gives the bytes of one process, with and without reference images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flux2_images import files, given_images
from local_fleet import LocalFleet
from models.catalog import open_model
from models.registry import load_registry
from served_fleet import served_fleet
from tiny_flux2 import build_tiny_flux2_klein

GIVEN: dict[str, Any] = {"prompt": "a red apple", "height": 32, "width": 48, "num_inference_steps": 2, "seed": 5}


def test_tensors_are_those_of_one_process(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = open_model(f"klein={build_tiny_flux2_klein(tmp_path / 'klein')}", load_registry())
    requests: list[Mapping[str, bytes]] = [{}, files(given_images(2))]
    local = LocalFleet(model)
    expected = [local.tensors(images=images, **GIVEN) for images in requests]
    local.close()
    assert not torch.equal(expected[0]["latents"], expected[1]["latents"])
    with served_fleet([model]) as fleet:
        got = [fleet.generate("klein", images=images, **GIVEN).tensors for images in requests]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys() == {"latents", "pixels"}
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
