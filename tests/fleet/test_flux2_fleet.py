"""FLUX.2 dev and klein: outputs of real services equal those of one process bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flux2_images import files, given_images
from local_fleet import LocalFleet
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from served_fleet import served_fleet
from tiny_flux2 import build_tiny_flux2_dev, build_tiny_flux2_klein

GIVEN: dict[str, Any] = {"prompt": "a red apple", "height": 32, "width": 48, "num_inference_steps": 2, "seed": 5}
REQUESTS: tuple[Mapping[str, bytes], ...] = ({}, files(given_images(2)))


def expected_of(model: ServedModel) -> list[dict[str, torch.Tensor]]:
    """Tensors of REQUESTS, computed by stages in this process."""
    local = LocalFleet(model)
    tensors = [local.tensors(images=images, **GIVEN) for images in REQUESTS]
    local.close()
    return tensors


def test_tensors_equal_those_of_one_process(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    paths = {"dev": build_tiny_flux2_dev(tmp_path / "dev"), "klein": build_tiny_flux2_klein(tmp_path / "klein")}
    models = {name: open_model(f"{name}={path}", load_registry()) for name, path in paths.items()}
    expected = {name: expected_of(model) for name, model in models.items()}
    with served_fleet(list(models.values())) as fleet:
        got = {name: [fleet.generate(name, images=images, **GIVEN).tensors for images in REQUESTS] for name in models}
    for name, (text, image) in expected.items():
        assert not torch.equal(text["latents"], image["latents"])
        for served, local in zip(got[name], (text, image), strict=True):
            assert served.keys() == local.keys() == {"latents", "pixels"}
            assert all(torch.equal(served[each], local[each]) for each in local)
