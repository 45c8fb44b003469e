"""Images of a request by role, which the coordinator reads from the message without decoding them."""

from __future__ import annotations

import pytest

from common.artifacts import ImageInputs
from common.codec import pack, unpack
from common.errors import InvalidInput
from common.tensors import TORCH
from fleet.v1 import generation_pb2
from services.coordinator.parameters import given_images


def message(*images: tuple[str, bytes]) -> generation_pb2.GenerationParameters:
    return generation_pb2.GenerationParameters(
        images=[generation_pb2.ImageInput(role=role, data=data) for role, data in images]
    )


def test_an_image_without_a_role_has_the_role_image() -> None:
    assert given_images(message(("", b"one"), ("last_image", b"two"))) == {"image": b"one", "last_image": b"two"}
    assert given_images(message()) == {}


@pytest.mark.parametrize("roles", [("image", ""), ("last_image", "last_image")])
def test_a_duplicate_role_is_refused(roles: tuple[str, str]) -> None:
    with pytest.raises(InvalidInput, match="is the role of two images") as caught:
        given_images(message(*((role, b"x") for role in roles)))
    assert caught.value.field == "images"


def test_more_than_16_images_are_refused() -> None:
    with pytest.raises(InvalidInput, match="17 images are too many; at most 16 are accepted"):
        given_images(message(*((f"image_{number}", b"x") for number in range(17))))


@pytest.mark.parametrize("size", [1, 64 * 1024, 64 * 1024 + 1, 3_000_000])
def test_image_bytes_are_packed_without_torch_and_unpacked_as_tensors(size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    packet = pack("image_inputs", ImageInputs(images={"image": data}))
    unpacked = unpack("image_inputs", ImageInputs, packet, TORCH).images["image"]
    assert not isinstance(unpacked, bytes)
    assert unpacked.numpy().tobytes() == data


def test_values_other_than_bytes_and_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match="packing tensors requires"):
        pack("image_inputs", ImageInputs(images={"image": "text"}))  # type: ignore[dict-item]
