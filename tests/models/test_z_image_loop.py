"""Z-Image's loop: truncated guidance, byte-equal resume, cancellation, warm-up, and config callbacks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.artifacts import Canvas
from configs.pipeline_configs.base import NEGATIVE, POSITIVE, Step
from configs.pipeline_configs.z_image import ZImagePipelineConfig
from local_fleet import LocalFleet, open_fleet
from loop_checks import check_cancel, check_resume, check_warm_up, denoised, denoising_input, denoising_stage
from models.contracts import DenoisingInput
from models.dits.z_image import ZImageTransformer2DModel
from models.runtime import Runtime
from tiny_z_image import TEXT_SIZE, build_tiny_z_image

STEPS = 4
GIVEN: dict[str, Any] = {
    "prompt": "a red apple",
    "negative_prompt": "a blue car",
    "height": 32,
    "width": 48,
    "num_inference_steps": STEPS,
    "num_outputs_per_prompt": 2,
    "cfg_truncation": 0.15,
    "cfg_normalization": 1.0,
    "seed": 3,
}
"""Guidance ends after the second step: 1 - sigma is 0, 0.1, 0.25 and 0.5."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    torch.set_num_threads(1)
    fleet = open_fleet(str(build_tiny_z_image(tmp_path_factory.mktemp("z") / "image")))
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def config(fleet: LocalFleet) -> ZImagePipelineConfig:
    return ZImagePipelineConfig.from_checkpoint(fleet.model.checkpoint)


@pytest.fixture(scope="module")
def x(fleet: LocalFleet) -> DenoisingInput:
    return denoising_input(fleet, GIVEN)


def test_conditioning_is_not_padded(x: DenoisingInput) -> None:
    """Embeddings have the prompt's tokens, 8 template tokens, and batch size 1 for any number of outputs."""
    both = (x.text_conditioning.prompt_embeds, x.text_conditioning.negative_prompt_embeds)
    assert [tuple(embeds["encoder_hidden_states"].shape) for embeds in both] == [(1, 11, TEXT_SIZE)] * 2
    assert x.initial_latents.parts["image"].latents.shape == (2, 16, 4, 6)


def test_guidance_ends_at_the_step_of_cfg_truncation(
    fleet: LocalFleet, x: DenoisingInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, calls = ZImageTransformer2DModel.predict, [0]

    def counted(self: ZImageTransformer2DModel, *arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        return predict(self, *arguments, **more)

    monkeypatch.setattr(ZImageTransformer2DModel, "predict", counted)
    for params, expected in (({"cfg_truncation": 0.15}, 6), ({}, 8), ({"cfg_truncation": 0.0}, 5)):
        calls[0] = 0
        denoised(denoising_stage(fleet, Runtime()), replace(x, sampling=replace(x.sampling, params=params)))
        assert calls[0] == expected, params


@pytest.mark.parametrize(("scale", "branches"), [(0.0, 1), (0.25, 2), (1.0, 2)])
def test_any_scale_above_zero_enables_guidance(fleet: LocalFleet, scale: float, branches: int) -> None:
    params, _ = fleet.model.variants[0].sampling_params.build(
        {**GIVEN, "guidance_scale": scale}, fleet.model.checkpoint
    )
    assert params.branches == branches


def test_cfg_truncation_is_compared_in_float32(config: ZImagePipelineConfig, x: DenoisingInput) -> None:
    """A step with 1 - sigma equal to the truncation value still has guidance."""
    level = float(torch.tensor(1000.0 - 900.0) / 1000)
    for truncation, expected in ((level, (POSITIVE, NEGATIVE)), (level - 1e-8, (POSITIVE,))):
        sampling = replace(x.sampling, params={"cfg_truncation": truncation})
        step = Step(1, 900.0, {"image": 0.9}, {"image": 0.75})
        assert tuple(config.active(step, (POSITIVE, NEGATIVE), sampling)) == expected


def test_a_loop_resumes_after_every_step_to_the_same_bytes(fleet: LocalFleet, x: DenoisingInput) -> None:
    check_resume(fleet, x)


def test_cancellation_ends_the_loop_within_a_step(fleet: LocalFleet, x: DenoisingInput) -> None:
    check_cancel(fleet, x)


def test_a_warm_up_runs_the_loop(fleet: LocalFleet) -> None:
    check_warm_up(fleet, "32x48")


def test_conditioning_and_config_keywords_are_the_parameters_of_forward(
    config: ZImagePipelineConfig, x: DenoisingInput
) -> None:
    embeds = x.text_conditioning.prompt_embeds
    own = config.prepare_pos_cond_kwargs(embeds, {"image": (2, 16, 4, 6)}, x.sampling)
    parameters = inspect.signature(ZImageTransformer2DModel.forward).parameters.keys() - {"self"}
    assert own.keys() | embeds.keys() | {"hidden_states", "timestep"} == parameters
    assert embeds.keys() == config.conditioning_shapes().keys()


def test_latent_shapes_match_the_published_size(config: ZImagePipelineConfig) -> None:
    canvas = Canvas(height=1024, width=768)
    assert config.raw_latent_shapes(canvas, 2) == {"image": (2, 16, 128, 96)}
    assert config.noise_dtype(torch.bfloat16) == torch.float32
