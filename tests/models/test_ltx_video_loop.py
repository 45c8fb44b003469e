"""LTX-Video: byte-equal resume, cancellation, warm-up, order of random numbers, config callbacks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from coarse_images import coarse_image, png
from common.artifacts import Canvas, Sampling
from common.stage import Call
from configs.pipeline_configs.base import DecodingNoise
from configs.pipeline_configs.ltx_video import LTXVideoImageToVideoPipelineConfig, LTXVideoPipelineConfig
from local_fleet import NO_IMAGES, LocalFleet, open_fleet
from loop_checks import check_cancel, check_resume, check_warm_up, denoising_input, denoising_stage
from models.contracts import DenoisingInput
from models.dits.ltx_video import LTXVideoTransformer3DModel
from models.runtime import Runtime
from tiny_ltx_video import CAPTION_SIZE, CHANNELS, build_tiny_ltx_video_095

GIVEN: dict[str, Any] = {
    "prompt": "a red apple",
    "negative_prompt": "a blue car on the moon",
    "height": 64,
    "width": 96,
    "num_inference_steps": 4,
    "num_outputs_per_prompt": 2,
    "num_frames": 9,
    "guidance_rescale": 0.5,
    "seed": 3,
}
IMAGES = {"text": NO_IMAGES, "image": {"image": png(coarse_image(90, 60))}}
CANVAS = Canvas(height=64, width=96, num_frames=9)
VIDEO_TOKENS = 12
FIRST_TOKENS = 6
"""Tokens of the first latent frame."""
VARIANTS = pytest.mark.parametrize("variant", IMAGES)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    torch.set_num_threads(1)
    fleet = open_fleet(str(build_tiny_ltx_video_095(tmp_path_factory.mktemp("ltx") / "video")))
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def configs(fleet: LocalFleet) -> dict[str, LTXVideoPipelineConfig]:
    config_classes = {"text": LTXVideoPipelineConfig, "image": LTXVideoImageToVideoPipelineConfig}
    return {variant: each.from_checkpoint(fleet.model.checkpoint) for variant, each in config_classes.items()}


@pytest.fixture(scope="module")
def inputs(fleet: LocalFleet) -> dict[str, DenoisingInput]:
    return {variant: denoising_input(fleet, GIVEN, images) for variant, images in IMAGES.items()}


def test_conditioning_is_not_padded_and_latents_are_packed(inputs: dict[str, DenoisingInput]) -> None:
    x = inputs["image"]
    text = x.text_conditioning
    assert text.prompt_embeds["encoder_hidden_states"].shape == (1, 4, CAPTION_SIZE)
    assert text.negative_prompt_embeds["encoder_hidden_states"].shape == (1, 7, CAPTION_SIZE)
    assert x.initial_latents.parts["video"].latents.shape == (2, VIDEO_TOKENS, CHANNELS)
    assert x.image_latents is not None
    assert x.image_latents.parts["condition"].latents.shape == (1, FIRST_TOKENS, CHANNELS)


@VARIANTS
def test_random_numbers_are_drawn_in_diffusers_order(inputs: dict[str, DenoisingInput], variant: str) -> None:
    """Order of the draws: image noise, initial noise, and the decoder's noise after the loop."""
    x, generator = inputs[variant], torch.Generator().manual_seed(GIVEN["seed"])
    if variant == "image":
        torch.randn(1, CHANNELS, 1, 2, 3, generator=generator)
    noise = torch.randn(2, CHANNELS, 2, 2, 3, generator=generator)
    assert torch.equal(x.initial_latents.parts["video"].latents, noise.flatten(2).transpose(1, 2))
    assert x.latents_generator is not None
    assert torch.equal(x.latents_generator.state, generator.get_state())


@VARIANTS
def test_the_loop_returns_the_generator_unchanged(
    fleet: LocalFleet, inputs: dict[str, DenoisingInput], variant: str
) -> None:
    x = inputs[variant]
    output = denoising_stage(fleet, Runtime(), variant).run(x, Call("test"))
    assert x.latents_generator is not None
    assert output.denoising_generator is not None
    assert torch.equal(output.denoising_generator.state, x.latents_generator.state)


@VARIANTS
def test_a_loop_resumes_after_every_step_to_the_same_bytes(
    fleet: LocalFleet, inputs: dict[str, DenoisingInput], variant: str
) -> None:
    check_resume(fleet, inputs[variant], variant)


@VARIANTS
def test_cancellation_ends_the_loop_within_a_step(
    fleet: LocalFleet, inputs: dict[str, DenoisingInput], variant: str
) -> None:
    check_cancel(fleet, inputs[variant], variant)


@VARIANTS
def test_a_warm_up_runs_the_loop(fleet: LocalFleet, variant: str) -> None:
    check_warm_up(fleet, f"64x96x9@{variant}")


@VARIANTS
def test_conditioning_and_config_keywords_are_the_parameters_of_forward(
    configs: dict[str, LTXVideoPipelineConfig], inputs: dict[str, DenoisingInput], variant: str
) -> None:
    config, embeds = configs[variant], inputs[variant].text_conditioning.prompt_embeds
    shapes = {**config.raw_latent_shapes(CANVAS, 2), **config.condition_shapes(CANVAS)}
    own = config.prepare_pos_cond_kwargs(embeds, shapes, inputs[variant].sampling)
    parameters = inspect.signature(LTXVideoTransformer3DModel.forward).parameters.keys() - {"self"}
    unused = set() if variant == "image" else {"first_positions"}
    assert own.keys() | embeds.keys() | {"hidden_states", "timestep"} == parameters - unused
    assert embeds.keys() == config.conditioning_shapes().keys()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, DecodingNoise(scale=0.0, timestep=0.0)),
        ({"decode_timestep": 0.05}, DecodingNoise(scale=0.05, timestep=0.05)),
        ({"decode_timestep": 0.05, "decode_noise_scale": 0.025}, DecodingNoise(scale=0.025, timestep=0.05)),
    ],
    ids=str,
)
def test_decoding_noise_follows_decode_timestep_and_decode_noise_scale(
    configs: dict[str, LTXVideoPipelineConfig], params: dict[str, float], expected: DecodingNoise
) -> None:
    sampling = Sampling(num_inference_steps=2, seed=0, params=params)
    assert configs["text"].decoding_noise(sampling) == expected


def test_latent_shapes_match_the_published_size(configs: dict[str, LTXVideoPipelineConfig]) -> None:
    config, canvas = configs["image"], Canvas(height=512, width=704, num_frames=161)
    assert config.raw_latent_shapes(canvas, 2) == {"video": (2, CHANNELS, 21, 16, 22)}
    assert config.posterior_shape(canvas) == (1, CHANNELS, 1, 16, 22)
    assert configs["text"].posterior_shape(canvas) is None
    assert config.noise_dtype(torch.bfloat16) == torch.float32
    raw = torch.randn(2, CHANNELS, 3, 4, 5)
    packed = config.pack("video", raw)
    assert packed.shape == (2, 60, CHANNELS)
    assert torch.equal(config.unpack("video", packed, tuple(raw.shape)), raw)
