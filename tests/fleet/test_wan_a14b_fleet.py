"""Wan 2.2 A14B, first and last frame: outputs of real services equal those of one process bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from coarse_images import coarse_image, png
from common.errors import InvalidInput
from local_fleet import LocalFleet
from models.catalog import open_model
from models.registry import load_registry
from served_fleet import served_fleet
from tiny_wan import build_tiny_wan_a14b_i2v

GIVEN: dict[str, Any] = {"prompt": "a red apple", "height": 32, "width": 48, "num_frames": 5, "seed": 5}
PARAMS: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale_2": 2.0}


def test_tensors_equal_those_of_one_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)
    path = build_tiny_wan_a14b_i2v(tmp_path_factory.mktemp("wan") / "a14b")
    model = open_model(f"a14b={path}", load_registry())
    images = {role: png(coarse_image(60, 40, seed)) for seed, role in enumerate(("image", "last_image"))}
    local = LocalFleet(model)
    expected = local.tensors(images=images, **GIVEN, **PARAMS)
    local.close()
    with served_fleet([model]) as fleet:
        answer = fleet.generate("a14b", images=images, **GIVEN, **PARAMS)
        with pytest.raises(InvalidInput, match="num_frames: 1 is not at least 5"):
            fleet.generate("a14b", images=images, **{**GIVEN, "num_frames": 1}, **PARAMS)
    assert answer.tensors.keys() == expected.keys() == {"latents", "pixels"}
    assert all(torch.equal(answer.tensors[name], expected[name]) for name in expected)
