"""HunyuanVideo's loop: rows of text for each step, byte-equal resume, cancel, warm-up, and callbacks of the config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from common.artifacts import Canvas, StepCheckpoint
from common.codec import pack, unpack
from common.errors import Cancelled
from common.stage import Call
from common.tensors import TORCH
from configs.pipeline_configs.hunyuan_video import HunyuanVideoPipelineConfig
from local_fleet import LocalFleet, open_fleet
from models.contracts import DenoisingInput
from models.dits.hunyuan_video import HunyuanVideoTransformer3DModel
from models.loader import load_module
from models.runtime import Runtime
from models.stages.denoising import DenoisingStage
from models.validation import InputValidationStage
from models.warm_up import WarmUp
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
    values = dict(InputValidationStage(fleet.model).run(GIVEN).artifacts)
    for service in ("text_encoding", "latent_preparation"):
        stages = fleet.services[service].of("")
        values |= stages.run({slot: values[slot] for slot in stages.contract.inputs if slot in values}, Call("test"))
    taken = inspect.signature(DenoisingInput).parameters
    return DenoisingInput(**{slot: value for slot, value in values.items() if slot in taken})


def stage(fleet: LocalFleet, runtime: Runtime) -> DenoisingStage:
    config = HunyuanVideoPipelineConfig.from_checkpoint(fleet.model.checkpoint)
    names = ("transformer", "scheduler")
    return DenoisingStage(
        config, runtime, {name: load_module(fleet.model.checkpoint, name, config, runtime) for name in names}
    )


def loop(fleet: LocalFleet, x: DenoisingInput, states: list[StepCheckpoint] | None = None) -> Tensor:
    """The loop's result; its step checkpoints are appended to `states`."""
    call = Call("test") if states is None else Call("test", on_step_checkpoint=states.append)
    output = stage(fleet, Runtime(step_checkpoint_every=1)).run(x, call)
    return output.denoised_latents.parts["video"].latents


def test_conditioning_is_cropped_and_not_padded(x: DenoisingInput) -> None:
    """Batch 1, whatever the number of outputs: the prompt's tokens and the mark of its end."""
    for embeds in (x.text_conditioning.prompt_embeds, x.text_conditioning.negative_prompt_embeds):
        shapes = {name: tuple(value.shape) for name, value in embeds.items()}
        assert shapes == {"encoder_hidden_states": (1, 4, TEXT_SIZE), "pooled_projections": (1, POOLED_SIZE)}
    assert x.initial_latents.parts["video"].latents.shape == (2, LATENT_CHANNELS, 2, 4, 6)


def test_the_refined_text_is_a_row_of_each_step(fleet: LocalFleet, x: DenoisingInput) -> None:
    transformer = stage(fleet, Runtime())._transformers["transformer"]
    embeds = {name: each.expand(2, *each.shape[1:]) for name, each in x.text_conditioning.prompt_embeds.items()}
    timesteps = x.schedule.timesteps[:, None].expand(-1, 2)
    with torch.inference_mode():
        prepared = transformer.prepare(timesteps, **embeds, guidance=torch.ones(2), video_ids=torch.zeros(12, 3))
    rows = prepared.steps["text_BTD"]
    assert rows.shape[:3] == (STEPS, 2, 4)
    assert all(not torch.equal(rows[0], row) for row in rows[1:])


def test_a_loop_resumes_after_every_step_to_the_same_bytes(fleet: LocalFleet, x: DenoisingInput) -> None:
    """Through the codec, as a checkpoint travels."""
    states: list[StepCheckpoint] = []
    whole = loop(fleet, x, states)
    assert [state.step for state in states] == [*range(1, STEPS)]
    for state in states:
        sent = unpack("state", StepCheckpoint, pack("state", state, TORCH), TORCH)
        assert torch.equal(loop(fleet, DenoisingInput(**vars(x) | {"resume_from": sent})), whole), state.step


def test_a_cancel_ends_the_loop_within_a_step(fleet: LocalFleet, x: DenoisingInput) -> None:
    heard: list[int] = []

    def on_progress(step: int, _: int) -> None:
        heard.append(step)
        if step == 2:
            call.cancelled.set()

    call = Call("test", on_progress=on_progress)
    with pytest.raises(Cancelled):
        stage(fleet, Runtime()).run(x, call)
    assert heard == [1, 2]


def test_a_warm_up_runs_the_loop(fleet: LocalFleet) -> None:
    steps: list[int] = []
    call = Call("warm-up", on_progress=lambda step, _: steps.append(step))
    WarmUp.parse(fleet.model, ("32x48x5",)).run(fleet.services["denoising"].of("").run, torch.float32, call)
    assert steps == [1, 2, 3]


def test_conditioning_is_exactly_what_forward_takes(config: HunyuanVideoPipelineConfig, x: DenoisingInput) -> None:
    embeds = x.text_conditioning.prompt_embeds
    own = config.prepare_pos_cond_kwargs(embeds, {"video": (2, 4, 2, 4, 6)}, x.sampling)
    taken = inspect.signature(HunyuanVideoTransformer3DModel.forward).parameters.keys() - {"self"}
    assert own.keys() | embeds.keys() | {"hidden_states", "timestep"} == taken
    assert embeds.keys() == config.conditioning_shapes().keys()


def test_shapes_of_the_published_size(config: HunyuanVideoPipelineConfig) -> None:
    canvas = Canvas(height=720, width=1280, num_frames=129)
    assert config.raw_latent_shapes(canvas, 2) == {"video": (2, LATENT_CHANNELS, 33, 90, 160)}
    assert config.noise_dtype(torch.bfloat16) == torch.float32
