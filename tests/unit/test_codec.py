"""Round trips of all artifacts and dtypes through the codec; errors name the field."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch

from async_tests import HANG_SECONDS
from common import artifacts
from common.artifacts import (
    Canvas,
    Conditioning,
    Generator,
    ImageInputs,
    LatentPart,
    Latents,
    Media,
    MediaItem,
    Prompt,
    Sampling,
    Schedule,
    StepCheckpoint,
)
from common.codec import NO_TENSORS, artifact_class, pack, read_param, unpack, write_param
from common.errors import InvalidInput
from common.rpc.frames import INLINE_BYTES
from common.rpc.framing import CallLimits, described_tensors
from common.tensors import TORCH
from fleet.v1 import artifacts_pb2 as pb

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.float64,
    torch.int32,
    torch.bool,
)
GENERATOR = Generator(seed=2**63, state=torch.Generator().get_state())
LATENTS = Latents(parts={"image": LatentPart(latents=torch.randn(1, 16, 4), raw_latent_shape=(1, 4, 4, 4))})
EVERY_ARTIFACT = (
    Prompt(prompt="a red apple 🍎"),
    Prompt(prompt="", negative_prompt="", prompt_2="two", negative_prompt_2="no", max_sequence_length=512),
    Canvas(height=64, width=96),
    Canvas(height=64, width=96, num_frames=81, frame_rate=16.0, output_format="mp4"),
    Sampling(num_inference_steps=4, seed=0),
    Sampling(
        num_inference_steps=4,
        seed=2**63 - 1,
        num_outputs_per_prompt=2,
        guidance_scale=3.3,
        true_cfg_scale=float("inf"),
        sigmas=(1.0, 0.1),
        params={"on": True, "count": -3, "scale": 3.3, "text": "x", "list": (0.1, 0.2), "none": ()},
    ),
    ImageInputs(images={"image": torch.arange(200_000).to(torch.uint8), "mask": torch.zeros(3, dtype=torch.uint8)}),
    Conditioning(prompt_embeds={"a": torch.randn(1, 512, 64), "b": torch.randn(2)}),
    Conditioning(prompt_embeds={}, negative_prompt_embeds={"a": torch.randn(1)}),
    Schedule(timesteps=torch.arange(4.0), sigmas=torch.rand(5), num_inference_steps=4),
    LATENTS,
    GENERATOR,
    StepCheckpoint(step=0, latents=LATENTS),
    StepCheckpoint(step=3, latents=LATENTS, solver={"old": torch.randn(4)}, generator=GENERATOR),
    Media(items=()),
    Media(
        items=(
            MediaItem(data=torch.zeros(9, dtype=torch.uint8), content_type="image/png", height=1, width=2),
            MediaItem(
                data=torch.ones(70_000, dtype=torch.uint8), content_type="video/mp4", height=1, width=2, num_frames=3
            ),
        )
    ),
)


def equal(left: Any, right: Any) -> bool:
    """Recursive equality; tensors are compared by dtype and value."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if dataclasses.is_dataclass(left):
        fields = dataclasses.fields(left)
        return type(left) is type(right) and all(equal(getattr(left, f.name), getattr(right, f.name)) for f in fields)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return type(left) is type(right) and bool(left == right)


@pytest.mark.parametrize("artifact", EVERY_ARTIFACT, ids=lambda each: type(each).__name__)
def test_artifacts_round_trip(artifact: Any) -> None:
    packet = pack("slot", artifact, TORCH)
    assert described_tensors("slot", packet.message, CallLimits()).keys() == packet.chunks.keys()
    assert equal(unpack("slot", type(artifact), packet, TORCH), artifact)


def test_every_artifact_is_covered() -> None:
    messages = set(pb.DESCRIPTOR.message_types_by_name)
    classes = {name for name, value in vars(artifacts).items() if dataclasses.is_dataclass(value)}
    assert {artifacts.message_name(name) for name in classes} <= messages
    assert classes == {type(each).__name__ for each in EVERY_ARTIFACT} | {"LatentPart", "MediaItem"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (3, 40_000)], ids=str)
def test_dtypes_and_shapes_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    packet = pack("c", Conditioning(prompt_embeds={"x": tensor}), TORCH)
    assert bool(packet.chunks) == (tensor.numel() * tensor.element_size() > INLINE_BYTES)
    found = unpack("c", Conditioning, packet, TORCH).prompt_embeds["x"]
    assert found.dtype == dtype
    assert found.shape == tensor.shape
    assert torch.equal(found, tensor)
    found.zero_()  # The tensor owns writable memory.


def test_bit_patterns_round_trip() -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800000, -0x80000000, 1], dtype=torch.int32).view(torch.float32)
    found = unpack("c", Conditioning, pack("c", Conditioning(prompt_embeds={"x": bits}), TORCH), TORCH)
    assert torch.equal(found.prompt_embeds["x"].view(torch.int32), bits.view(torch.int32))


def test_strided_tensors_that_require_grad_round_trip() -> None:
    strided = torch.arange(40_000.0, requires_grad=True).reshape(200, 200).t()
    found = unpack("c", Conditioning, pack("c", Conditioning(prompt_embeds={"x": strided}), TORCH), TORCH)
    assert torch.equal(found.prompt_embeds["x"], strided.detach())


def test_packing_a_large_tensor_copies_nothing() -> None:
    tensor = torch.zeros(1 << 20, dtype=torch.uint8)
    (piece,) = pack("c", Conditioning(prompt_embeds={"x": tensor}), TORCH).chunks["c.prompt_embeds.x"]
    tensor[0] = 7
    assert piece.data[0] == 7


def test_many_small_tensors_do_not_exceed_the_header_limit() -> None:
    media = Media(
        items=tuple(
            MediaItem(data=torch.full((60_000,), index, dtype=torch.uint8), content_type="x", height=1, width=1)
            for index in range(64)
        )
    )
    packet = pack("media", media, TORCH)
    assert packet.message.ByteSize() < 2 << 20
    assert len(packet.chunks) > 32
    assert equal(unpack("media", Media, packet, TORCH), media)


def test_maps_are_unpacked_in_sorted_order() -> None:
    given = Conditioning(prompt_embeds={key: torch.zeros(1) for key in ("b", "c", "a")})
    assert list(unpack("c", Conditioning, pack("c", given, TORCH), TORCH).prompt_embeds) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("artifact", "field"),
    [
        (Canvas(height=-1, width=8), "slot.height"),
        (Canvas(height=1 << 40, width=8), "slot.height"),
        (Canvas(height=8.5, width=8), "slot.height"),  # type: ignore[arg-type]
        (Prompt(prompt="\ud800"), "slot.prompt"),
        (Prompt(prompt=None), "slot.prompt"),  # type: ignore[arg-type]
        (Sampling(num_inference_steps=1, seed=-1), "slot.seed"),
        (Sampling(num_inference_steps=1, seed=1, params={"big": 1 << 70}), "slot.params.big"),
        (Sampling(num_inference_steps=1, seed=1, params={"odd": None}), "slot.params.odd"),  # type: ignore[dict-item]
        (Conditioning(prompt_embeds={"x": torch.zeros(1, dtype=torch.complex64)}), "slot.prompt_embeds.x"),
        (Conditioning(prompt_embeds={"x": [1.0]}), "slot.prompt_embeds.x"),  # type: ignore[dict-item]
        (StepCheckpoint(step=1, latents=GENERATOR), "slot.latents"),  # type: ignore[arg-type]
    ],
)
def test_unrepresentable_values_are_refused_by_field(artifact: Any, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        pack("slot", artifact, TORCH)
    assert caught.value.field == field


def test_a_missing_field_is_refused_by_path() -> None:
    packet = pack("slot", StepCheckpoint(step=1, latents=LATENTS), TORCH)
    packet.message.ClearField("latents")
    with pytest.raises(InvalidInput, match=r"slot\.latents is missing"):
        unpack("slot", StepCheckpoint, packet, TORCH)


def test_a_parameter_without_a_value_is_refused() -> None:
    with pytest.raises(InvalidInput, match="p has no value"):
        read_param("p", pb.ParamValue())
    assert read_param("p", write_param("p", True)) is True


def test_an_invalid_bool_byte_is_refused() -> None:
    packet = pack("c", Conditioning(prompt_embeds={"x": torch.tensor([True])}), TORCH)
    message: Any = packet.message
    message.prompt_embeds["x"].data = b"\x02"
    with pytest.raises(InvalidInput, match="neither 0 nor 1"):
        unpack("c", Conditioning, packet, TORCH)


def test_programming_errors_raise_type_error() -> None:
    with pytest.raises(TypeError, match="not an artifact"):
        pack("slot", object())
    with pytest.raises(TypeError, match="not an artifact"):
        artifact_class("ParamValue")
    with pytest.raises(TypeError, match="not a Canvas"):
        unpack("slot", Canvas, pack("slot", Prompt(prompt="x")))
    with pytest.raises(TypeError, match=r"requires common\.tensors\.TORCH"):
        pack("slot", GENERATOR, NO_TENSORS)
    with pytest.raises(TypeError, match=r"requires common\.tensors\.TORCH"):
        unpack("slot", Generator, pack("slot", GENERATOR, TORCH))


def test_scalar_artifacts_pack_without_torch() -> None:
    program = (
        "import sys\n"
        "from common.artifacts import Prompt, Sampling\n"
        "from common.codec import pack, unpack\n"
        "import common.rpc.client\n"
        "given = Sampling(num_inference_steps=1, seed=2, params={'x': 3.3})\n"
        "assert unpack('s', Sampling, pack('s', given)) == given\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=HANG_SECONDS)
