"""HunyuanVideo: refined text per step, byte-equal resume, cancellation, warm-up, config callbacks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from common.artifacts import Canvas
from configs.pipeline_configs.hunyuan_video import HunyuanVideoPipelineConfig
from local_fleet import LocalFleet, open_fleet
from loop_checks import check_cancel, check_resume, check_warm_up, denoising_input, denoising_stage
from models.contracts import DenoisingInput
from models.dits.hunyuan_video import HunyuanVideoTransformer3DModel
from models.runtime import Runtime
from tiny_hunyuan_video import LATENT_CHANNELS, POOLED_SIZE, TEXT_SIZE, build_tiny_hunyuan_video

STEPS = 4
GIVEN: dict[str, Any] = {
    "prompt": "a red apple",
    "negative_prompt": "a blue car",
    "height": 32,
    "width": 48,
    "num_inference_steps": STEPS,
    "num_outputs_per_prompt": 2,
    "num_frames": 5,
    "true_cfg_scale": 3.0,
    "seed": 3,
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    torch.set_num_threads(1)
    fleet = open_fleet(str(build_tiny_hunyuan_video(tmp_path_factory.mktemp("hunyuan") / "video")))
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def config(fleet: LocalFleet) -> HunyuanVideoPipelineConfig:
    return HunyuanVideoPipelineConfig.from_checkpoint(fleet.model.checkpoint)


@pytest.fixture(scope="module")
def x(fleet: LocalFleet) -> DenoisingInput:
    return denoising_input(fleet, GIVEN)


def test_conditioning_has_no_template_tokens_and_no_padding(x: DenoisingInput) -> None:
    """Embeddings have batch size 1 for any number of outputs, with the prompt's tokens and the EOS token."""
    for embeds in (x.text_conditioning.prompt_embeds, x.text_conditioning.negative_prompt_embeds):
        shapes = {name: tuple(value.shape) for name, value in embeds.items()}
        assert shapes == {"encoder_hidden_states": (1, 4, TEXT_SIZE), "pooled_projections": (1, POOLED_SIZE)}
    assert x.initial_latents.parts["video"].latents.shape == (2, LATENT_CHANNELS, 2, 4, 6)


def test_refined_text_has_a_row_for_each_step(fleet: LocalFleet, x: DenoisingInput) -> None:
    transformer = denoising_stage(fleet, Runtime())._predictor.transformers["transformer"]
    embeds = {name: each.expand(2, *each.shape[1:]) for name, each in x.text_conditioning.prompt_embeds.items()}
    timesteps = x.schedule.timesteps[:, None].expand(-1, 2)
    with torch.inference_mode():
        prepared = transformer.prepare(timesteps, **embeds, guidance=torch.ones(2), video_ids=torch.zeros(12, 3))
    rows = prepared.steps["text_BTD"]
    assert rows.shape[:3] == (STEPS, 2, 4)
    assert all(not torch.equal(rows[0], row) for row in rows[1:])


def test_a_loop_resumes_after_every_step_to_the_same_bytes(fleet: LocalFleet, x: DenoisingInput) -> None:
    check_resume(fleet, x)


def test_cancellation_ends_the_loop_within_a_step(fleet: LocalFleet, x: DenoisingInput) -> None:
    check_cancel(fleet, x)


def test_a_warm_up_runs_the_loop(fleet: LocalFleet) -> None:
    check_warm_up(fleet, "32x48x5")


def test_conditioning_and_config_keywords_are_the_parameters_of_forward(
    config: HunyuanVideoPipelineConfig, x: DenoisingInput
) -> None:
    embeds = x.text_conditioning.prompt_embeds
    own = config.prepare_pos_cond_kwargs(embeds, {"video": (2, 4, 2, 4, 6)}, x.sampling)
    parameters = inspect.signature(HunyuanVideoTransformer3DModel.forward).parameters.keys() - {"self"}
    assert own.keys() | embeds.keys() | {"hidden_states", "timestep"} == parameters
    assert embeds.keys() == config.conditioning_shapes().keys()


def test_latent_shapes_match_the_published_size(config: HunyuanVideoPipelineConfig) -> None:
    canvas = Canvas(height=720, width=1280, num_frames=129)
    assert config.raw_latent_shapes(canvas, 2) == {"video": (2, LATENT_CHANNELS, 33, 90, 160)}
    assert config.noise_dtype(torch.bfloat16) == torch.float32
