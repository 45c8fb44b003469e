"""LTX-Video: outputs of real services equal those of one process bit for bit. Some requests have an image."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import av
import pytest
import torch

from coarse_images import coarse_image, png
from common.errors import InvalidInput
from local_fleet import NO_IMAGES, LocalFleet
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from served_fleet import ServedFleet, served_fleet
from tiny_ltx_video import build_tiny_ltx_video_095

GIVEN: dict[str, Any] = {
    "prompt": "a red apple",
    "negative_prompt": "a blue car",
    "height": 64,
    "width": 96,
    "num_inference_steps": 2,
    "num_outputs_per_prompt": 2,
    "num_frames": 9,
    "decode_timestep": 0.05,
    "decode_noise_scale": 0.025,
    "seed": 5,
}
IMAGES = {"text": NO_IMAGES, "image": {"image": png(coarse_image(90, 60))}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    torch.set_num_threads(1)
    return open_model(f"ltx={build_tiny_ltx_video_095(tmp_path_factory.mktemp('ltx') / 'video')}", load_registry())


@pytest.fixture(scope="module")
def fleet(model: ServedModel) -> Iterator[ServedFleet]:
    with served_fleet([model]) as served:
        yield served


@pytest.mark.parametrize("variant", IMAGES)
def test_tensors_equal_those_of_one_process(fleet: ServedFleet, model: ServedModel, variant: str) -> None:
    """The decoder also draws noise, with the request's generator."""
    local = LocalFleet(model)
    expected = local.tensors(images=IMAGES[variant], **GIVEN)
    local.close()
    got = fleet.generate("ltx", images=IMAGES[variant], **GIVEN).tensors
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_video_is_an_mp4_of_all_frames(fleet: ServedFleet) -> None:
    """Each MP4 has one fragment, because the VAE decodes all frames at once."""
    files = fleet.generate("ltx", ".mp4", **GIVEN).files
    assert len(files) == GIVEN["num_outputs_per_prompt"]
    for data in files:
        with av.open(io.BytesIO(data), "r") as container:
            assert len(list(container.decode(video=0))) == GIVEN["num_frames"]


@pytest.mark.parametrize(("change", "field"), [({"height": 40}, "height"), ({"num_frames": 0}, "num_frames")], ids=str)
def test_invalid_input_is_refused_at_submission(fleet: ServedFleet, change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        fleet.generate("ltx", **{**GIVEN, **change})
    assert caught.value.field == field
