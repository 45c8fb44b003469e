"""GLM-Image's stage before denoising, and its loop: conditioning, byte-equal resume, config callbacks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from common.artifacts import Canvas, Sampling, StepCheckpoint
from common.codec import pack, unpack
from common.errors import Cancelled
from common.stage import Call
from common.tensors import TORCH
from configs.pipeline_configs.glm_image import GlmImagePipelineConfig
from local_fleet import LocalFleet, open_fleet
from models.contracts import DenoisingInput
from models.dits.glm_image import GlmImageTransformer2DModel
from models.loader import load_module
from models.runtime import Runtime
from models.stages.denoising import DenoisingStage
from models.validation import InputValidationStage
from step_checkpoints import step_checkpoints_to
from tiny_glm_image import GLYPH_SIZE, build_tiny_glm_image

STEPS = 4
GIVEN: dict[str, Any] = {
    "prompt": "a red car with 'old stone' on it",
    "height": 64,
    "width": 96,
    "num_inference_steps": STEPS,
    "num_outputs_per_prompt": 2,
    "seed": 3,
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    torch.set_num_threads(1)
    fleet = open_fleet(str(build_tiny_glm_image(tmp_path_factory.mktemp("glm") / "image")))
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def config(fleet: LocalFleet) -> GlmImagePipelineConfig:
    return GlmImagePipelineConfig.from_checkpoint(fleet.model.checkpoint)


def request(fleet: LocalFleet, **given: Any) -> Mapping[str, Any]:
    """Artifacts of a validated request."""
    return InputValidationStage(fleet.model).run({**GIVEN, **given}).artifacts


def run_before_denoising(fleet: LocalFleet, call: Call, **given: Any) -> dict[str, Any]:
    """Run the service before denoising; returns its output slots."""
    return fleet.services["before_denoising"].of("").run(request(fleet, **given), call)


@pytest.fixture(scope="module")
def x(fleet: LocalFleet) -> DenoisingInput:
    return DenoisingInput(**run_before_denoising(fleet, Call("test")), sampling=request(fleet)["sampling"])


def test_conditioning_has_both_branches(x: DenoisingInput) -> None:
    """Embeddings have batch size 1 for any number of outputs. The negative branch has one glyph token, EOS."""
    shapes = {name: tuple(value.shape) for name, value in x.text_conditioning.prompt_embeds.items()}
    assert shapes == {"encoder_hidden_states": (1, 10, GLYPH_SIZE), "prior_token_id": (1, 4 * 2 * 3)}
    negative = x.text_conditioning.negative_prompt_embeds
    assert tuple(negative["encoder_hidden_states"].shape) == (1, 1, GLYPH_SIZE)
    assert torch.equal(negative["prior_token_id"], x.text_conditioning.prompt_embeds["prior_token_id"])
    assert x.initial_latents.parts["image"].raw_latent_shape == (2, 16, 8, 12)


def test_without_guidance_there_is_no_negative_branch(fleet: LocalFleet) -> None:
    outputs = run_before_denoising(fleet, Call("test"), guidance_scale=1.0)
    assert not outputs["text_conditioning"].negative_prompt_embeds


def test_timesteps_are_integers_and_sigmas_are_shifted(x: DenoisingInput) -> None:
    assert x.schedule.timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0]
    sigmas = x.schedule.sigmas.tolist()
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0
    assert all(abs(sigma - step / 1000) > 0.05 for sigma, step in zip(sigmas[1:-1], (750, 500, 250), strict=True))


def loop(fleet: LocalFleet, x: DenoisingInput, states: list[StepCheckpoint] | None = None) -> Tensor:
    """Run the loop; returns its result and appends step checkpoints to `states`."""
    config = GlmImagePipelineConfig.from_checkpoint(fleet.model.checkpoint)
    runtime = Runtime(step_checkpoint_every=1)
    modules = {
        name: load_module(fleet.model.checkpoint, name, config, runtime) for name in ("transformer", "scheduler")
    }
    call = Call("test") if states is None else Call("test", on_item=step_checkpoints_to(states.append))
    return DenoisingStage(config, runtime, modules).run(x, call).denoised_latents.parts["image"].latents


def test_a_loop_resumes_after_every_step_to_the_same_bytes(fleet: LocalFleet, x: DenoisingInput) -> None:
    """Step checkpoints are serialized and parsed, as between workers."""
    states: list[StepCheckpoint] = []
    whole = loop(fleet, x, states)
    assert [state.step for state in states] == [*range(1, STEPS)]
    for state in states:
        sent = unpack("state", StepCheckpoint, pack("state", state, TORCH), TORCH)
        assert torch.equal(loop(fleet, DenoisingInput(**vars(x) | {"resume_from": sent})), whole), state.step


def test_cancellation_after_a_token_ends_the_stage(fleet: LocalFleet) -> None:
    recorded: list[int] = []

    def on_progress(token: int, _: int) -> None:
        recorded.append(token)
        if token == 7:
            call.cancelled.set()

    call = Call("test", on_progress=on_progress)
    for _ in range(2):
        with pytest.raises(Cancelled):
            run_before_denoising(fleet, call)
        assert recorded == [1, 2, 3, 4, 5, 6, 7], "a cancelled call reports no further progress and does not restart"


def test_conditioning_and_config_keywords_are_the_parameters_of_forward(
    config: GlmImagePipelineConfig, x: DenoisingInput
) -> None:
    embeds = x.text_conditioning.prompt_embeds
    sampling = Sampling(num_inference_steps=STEPS, seed=0)
    own = config.prepare_pos_cond_kwargs(embeds, {"image": (2, 16, 8, 12)}, sampling)
    assert own.keys() == config.prepare_neg_cond_kwargs(embeds, {"image": (2, 16, 8, 12)}, sampling).keys()
    parameters = inspect.signature(GlmImageTransformer2DModel.forward).parameters.keys() - {"self"}
    assert own.keys() | embeds.keys() | {"hidden_states", "timestep"} == parameters
    canvas = Canvas(height=64, width=96)
    assert embeds.keys() == config.conditioning_shapes().keys() | config.conditioning_id_shapes(canvas).keys()


def test_shapes_and_shift_of_a_large_image_match_their_formulas(config: GlmImagePipelineConfig) -> None:
    canvas = Canvas(height=1152, width=768)
    assert config.prior_grid(canvas) == (36, 24)
    assert config.raw_latent_shapes(canvas, 2) == {"image": (2, 16, 144, 96)}
    assert config.conditioning_id_shapes(canvas) == {"prior_token_id": (1, 72 * 48)}
    assert abs(config.mu(canvas) - (0.25 + 0.75 * (72 * 48 / 256) ** 0.5)) < 1e-12
