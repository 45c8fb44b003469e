"""Z-Image: outputs of real services equal those of one process bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from common.errors import InvalidInput
from local_fleet import LocalFleet
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from served_fleet import ServedFleet, served_fleet
from tiny_z_image import build_tiny_z_image

GIVEN: dict[str, Any] = {
    "prompt": "a red apple",
    "negative_prompt": "a blue car",
    "height": 32,
    "width": 48,
    "num_inference_steps": 3,
    "num_outputs_per_prompt": 2,
    "cfg_truncation": 0.15,
    "cfg_normalization": 1.0,
    "seed": 5,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    torch.set_num_threads(1)
    return open_model(f"z={build_tiny_z_image(tmp_path_factory.mktemp('z') / 'image')}", load_registry())


@pytest.fixture(scope="module")
def fleet(model: ServedModel) -> Iterator[ServedFleet]:
    with served_fleet([model]) as served:
        yield served


def test_tensors_equal_those_of_one_process(fleet: ServedFleet, model: ServedModel) -> None:
    local = LocalFleet(model)
    expected = local.tensors(**GIVEN)
    local.close()
    got = fleet.generate("z", **GIVEN).tensors
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("change", "field"), [({"height": 40}, "height"), ({"guidance_scale": -1.0}, "guidance_scale")], ids=str
)
def test_invalid_input_is_refused_at_submission(fleet: ServedFleet, change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        fleet.generate("z", **{**GIVEN, **change})
    assert caught.value.field == field
