"""Wan 2.1, with and without images: outputs of real services equal those of one process bit for bit."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InvalidInput
from local_fleet import LocalFleet
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from served_fleet import ServedFleet, served_fleet
from services.cli.client import RequestFailed
from tiny_wan import build_tiny_wan, build_tiny_wan_i2v

GIVEN: dict[str, Any] = {
    "prompt": "a red apple",
    "height": 32,
    "width": 48,
    "num_frames": 5,
    "num_inference_steps": 3,
    "seed": 5,
}


def image_file(seed: int, image_format: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (90, 60)) -> bytes:
    channels = len(mode)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), np.uint8)
    file = io.BytesIO()
    Image.frombytes(mode, size, pixels.tobytes()).save(file, image_format)
    return file.getvalue()


IMAGES = {
    "t2v": {},
    "i2v": {"image": image_file(1)},
    "flf2v": {"image": image_file(1), "last_image": image_file(2, "JPEG", "CMYK")},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ServedModel]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("wan")
    paths = {
        "t2v": build_tiny_wan(root / "t2v"),
        "i2v": build_tiny_wan_i2v(root / "i2v"),
        "flf2v": build_tiny_wan_i2v(root / "flf2v", last_image=True),
    }
    return {name: open_model(f"{name}={path}", load_registry()) for name, path in paths.items()}


@pytest.fixture(scope="module")
def fleet(models: dict[str, ServedModel]) -> Iterator[ServedFleet]:
    with served_fleet(list(models.values())) as served:
        yield served


@pytest.mark.parametrize("name", ["t2v", "i2v", "flf2v"])
def test_tensors_equal_those_of_one_process(fleet: ServedFleet, models: dict[str, ServedModel], name: str) -> None:
    local = LocalFleet(models[name])
    expected = local.tensors(images=IMAGES[name], **GIVEN)
    local.close()
    got = fleet.generate(name, images=IMAGES[name], **GIVEN).tensors
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_model_lists_its_image_roles(models: dict[str, ServedModel]) -> None:
    roles = {name: [spec.name for spec in model.parameters() if spec.type == "image"] for name, model in models.items()}
    assert roles == {"t2v": [], "i2v": ["image"], "flf2v": ["image", "last_image"]}


def test_large_image_is_sent_in_chunks(fleet: ServedFleet, models: dict[str, ServedModel]) -> None:
    large = {"image": image_file(3, size=(900, 700))}
    assert len(large["image"]) > 2**20, "the image fits into one chunk"
    local = LocalFleet(models["i2v"])
    expected = local.tensors(images=large, **GIVEN)["latents"]
    local.close()
    assert torch.equal(fleet.generate("i2v", images=large, **GIVEN).tensors["latents"], expected)


def test_videos_are_mp4_of_the_requested_size_and_rate(fleet: ServedFleet) -> None:
    answer = fleet.generate(
        "t2v", ".mp4", **{**GIVEN, "num_frames": 11, "num_outputs_per_prompt": 2, "frame_rate": 12.5}
    )
    assert [(warning.field, warning.message) for warning in answer.warnings] == [
        ("num_frames", "11 is not one more than a multiple of 4; 9 is used instead")
    ]
    assert len(answer.files) == 2
    for data in answer.files:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height, float(stream.average_rate or 0)) == (48, 32, 12.5)
            assert len(list(container.decode(stream))) == 9


def _truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _corrupted(data: bytes) -> bytes:
    """A PNG with inverted bytes in its pixel data; the header and the chunk lengths are valid."""
    at = data.index(b"IDAT") + 20
    return data[:at] + bytes(255 - byte for byte in data[at : at + 200]) + data[at + 200 :]


@pytest.mark.parametrize(
    ("name", "images", "field", "message"),
    [
        ("t2v", {"image": image_file(1)}, "images", "takes no images"),
        ("i2v", {}, "image", "image: no image was sent"),
        (
            "i2v",
            {"image": image_file(1), "image_1": image_file(1)},
            "image_1",
            "image, image_1 is not a set of images",
        ),
        ("i2v", {"image": b"no image"}, "image", "is not a PNG, JPEG or WebP image"),
        ("i2v", {"image": _truncated(image_file(1))}, "image", "is truncated"),
        ("i2v", {"image": image_file(1, "GIF")}, "image", "but GIF"),
        ("flf2v", {"image": image_file(1)}, "last_image", "last_image: no image was sent"),
    ],
)
def test_invalid_images_are_refused_at_submission(
    fleet: ServedFleet, name: str, images: dict[str, bytes], field: str, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        fleet.generate(name, images=images, **GIVEN)
    assert caught.value.field == field


def test_undecodable_image_fails_the_request_and_not_the_worker(fleet: ServedFleet) -> None:
    with pytest.raises(RequestFailed, match="INVALID_ARGUMENT: image: the image cannot be decoded") as caught:
        fleet.generate("i2v", images={"image": _corrupted(image_file(1))}, **GIVEN)
    assert caught.value.field == "image"
    assert fleet.generate("i2v", images=IMAGES["i2v"], **GIVEN).files
