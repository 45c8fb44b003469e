"""Each Wan 2.1 stage alone: resume, refused inputs, dtypes, and image preprocessing."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.artifacts import Canvas, ImageInputs, Prompt, Sampling, StepCheckpoint
from common.codec import pack, unpack
from common.local import HostedStages
from common.stage import Call
from common.tensors import TORCH
from configs.pipeline_configs.wan import WanImageToVideoPipelineConfig
from local_fleet import RecordedCall
from models.catalog import ServedModel, open_model
from models.images import as_tensor, open_image, open_images
from models.loader import load_stages
from models.registry import load_registry
from models.runtime import Runtime
from step_checkpoints import step_checkpoints_to
from tiny_wan import build_tiny_wan_i2v

STEPS = 5
CANVAS = Canvas(height=32, width=48, num_frames=5, output_format="safetensors")
SAMPLING = Sampling(num_inference_steps=STEPS, seed=3, guidance_scale=4.0)
CPU = torch.device("cpu")

Slots = dict[str, Any]


def png(size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], len(mode)), np.uint8)
    file = io.BytesIO()
    Image.frombytes(mode, size, pixels.tobytes()).save(file, "PNG")
    return file.getvalue()


def inputs(**files: bytes) -> ImageInputs:
    return ImageInputs(
        images={role: torch.frombuffer(bytearray(data), dtype=torch.uint8) for role, data in files.items()}
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    torch.set_num_threads(1)
    return open_model(str(build_tiny_wan_i2v(tmp_path_factory.mktemp("wan") / "i2v")), load_registry())


@pytest.fixture(scope="module")
def services(model: ServedModel) -> dict[str, HostedStages]:
    return {
        spec.service: HostedStages(
            spec.service, load_stages(model, spec, Runtime(device=CPU, dtype=torch.float32, step_checkpoint_every=1))
        )
        for spec in model.services
    }


@pytest.fixture(scope="module")
def prepared(services: dict[str, HostedStages]) -> Slots:
    """All input slots of the loop."""
    slots: Slots = {
        "prompt": Prompt(prompt="a red apple"),
        "canvas": CANVAS,
        "sampling": SAMPLING,
        "image_inputs": inputs(image=png()),
    }
    for name in ("text_encoding", "image_encoding", "latent_preparation"):
        slots |= run(services, name, slots)
    return slots


def run(services: dict[str, HostedStages], name: str, slots: Slots, call: Call | None = None) -> Slots:
    stages = services[name]
    given = {slot: slots[slot] for slot in stages.contract.inputs if slot in slots}
    return stages.run(given, call or RecordedCall().call())


def test_a_loop_resumes_after_every_step_to_the_same_bytes(services: dict[str, HostedStages], prepared: Slots) -> None:
    """Step checkpoints, which include the solver's history, are serialized and parsed."""
    states: list[StepCheckpoint] = []
    call = Call("test", on_item=step_checkpoints_to(states.append))
    whole = run(services, "denoising", prepared, call)["denoised_latents"]
    assert [state.step for state in states] == [1, 2, 3, 4]
    for state in states:
        traveled = unpack("state", StepCheckpoint, pack("state", state, TORCH), TORCH)
        again = run(services, "denoising", {**prepared, "resume_from": traveled})["denoised_latents"]
        assert torch.equal(again.parts["video"].latents, whole.parts["video"].latents), f"after step {state.step}"


def test_noise_and_latents_are_float32_for_any_weight_dtype(model: ServedModel) -> None:
    config = WanImageToVideoPipelineConfig.from_checkpoint(model.checkpoint)
    assert config.noise_dtype(torch.bfloat16) is torch.float32
    latents, condition = torch.zeros(1, 16, 1, 2, 2), torch.zeros(1, 20, 1, 2, 2)
    given = config.model_input({"video": latents}, {"condition": condition})["video"]
    assert (given.dtype, given.shape[1]) == (torch.float32, 36)


def test_bfloat16_runs_from_image_to_video(model: ServedModel) -> None:
    services = {
        spec.service: HostedStages(spec.service, load_stages(model, spec, Runtime(device=CPU, dtype=torch.bfloat16)))
        for spec in model.services
    }
    slots: Slots = {
        "prompt": Prompt(prompt="a red apple"),
        "canvas": dataclasses.replace(CANVAS, output_format="mp4", frame_rate=10.0),
        "sampling": SAMPLING,
        "image_inputs": inputs(image=png()),
    }
    recorded = RecordedCall()
    for name in services:
        slots |= run(services, name, slots, recorded.call())
    assert slots["denoised_latents"].parts["video"].latents.dtype == torch.float32
    assert slots["image_latents"].parts["condition"].latents.shape == (1, 20, 2, 4, 6)
    (item,) = recorded.items["media_items"]
    assert (item.content_type, item.num_frames) == ("video/mp4", 5)


def test_the_mask_marks_the_input_frames(services: dict[str, HostedStages], prepared: Slots) -> None:
    condition = prepared["image_latents"].parts["condition"].latents
    mask = condition[0, :4, :, 0, 0]
    assert mask[:, 0].tolist() == [1, 1, 1, 1]
    assert mask[:, 1].tolist() == [0, 0, 0, 0]
    del services


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_images_are_converted_to_rgb(mode: str) -> None:
    image = open_image("image", png(mode=mode))
    assert (image.mode, image.size) == ("RGB", (40, 30))


def test_images_are_stretched_to_the_canvas() -> None:
    pixels = as_tensor(open_image("image", png((200, 20))), 32, 48)
    assert pixels.shape == (1, 3, 32, 48)
    assert -1 <= float(pixels.min()) < -0.5 < 0.5 < float(pixels.max()) <= 1


def test_images_are_ordered_by_their_numbers() -> None:
    roles = ["last_image", *(f"image_{number}" for number in (10, 2, 1)), "image"]
    opened = open_images(inputs(**{role: png() for role in roles}))
    assert list(opened) == ["image", "image_1", "image_2", "image_10", "last_image"]
