"""The pictures of a request by role, as the coordinator takes them from the message and passes them on unopened."""

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


def test_a_picture_without_a_role_is_the_image() -> None:
    assert given_images(message(("", b"one"), ("last_image", b"two"))) == {"image": b"one", "last_image": b"two"}
    assert given_images(message()) == {}


@pytest.mark.parametrize("roles", [("image", ""), ("last_image", "last_image")])
def test_a_role_comes_once(roles: tuple[str, str]) -> None:
    with pytest.raises(InvalidInput, match="two pictures came as") as caught:
        given_images(message(*((role, b"x") for role in roles)))
    assert caught.value.field == "images"


def test_there_is_an_end_to_pictures() -> None:
    with pytest.raises(InvalidInput, match="17 pictures came; at most 16 are taken"):
        given_images(message(*((f"image_{number}", b"x") for number in range(17))))


@pytest.mark.parametrize("size", [1, 64 * 1024, 64 * 1024 + 1, 3_000_000])
def test_bytes_travel_without_torch_and_arrive_as_tensors(size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    packet = pack("image_inputs", ImageInputs(images={"image": data}))
    arrived = unpack("image_inputs", ImageInputs, packet, TORCH).images["image"]
    assert not isinstance(arrived, bytes)
    assert arrived.numpy().tobytes() == data


def test_other_values_do_not_pass_for_pictures() -> None:
    with pytest.raises(TypeError, match="packing tensors requires"):
        pack("image_inputs", ImageInputs(images={"image": "text"}))  # type: ignore[dict-item]
