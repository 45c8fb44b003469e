"""Each Flux stage alone on a small checkpoint: outputs, warnings, progress, cancellation and resume."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from common.artifacts import Canvas, Conditioning, Latents, Prompt, Sampling, StepCheckpoint
from common.codec import pack, unpack
from common.errors import Cancelled, InternalError, InvalidInput
from common.local import HostedStages
from common.stage import Call
from common.tensors import TORCH
from configs.pipeline_configs.flux import FluxPipelineConfig
from flux_pair import Pair
from local_fleet import RecordedCall
from models import contracts
from models.dits.flux import FluxTransformer2DModel
from models.loader import load_stages
from models.runtime import Runtime
from models.stages.decoding import DecodingStage
from models.stages.denoising import DenoisingStage
from models.stages.latent_preparation import LatentPreparationStage
from models.stages.predictor import merge_conditioning
from models.stages.text_encoding import TextEncodingStage
from models.stages.timestep_preparation import TimestepPreparationStage
from step_checkpoints import step_checkpoints_to

STEPS = 5
CANVAS = Canvas(height=32, width=48)
SAMPLING = Sampling(num_inference_steps=STEPS, seed=3, num_outputs_per_prompt=2, guidance_scale=4.0, true_cfg_scale=2.0)
PROMPT = Prompt(prompt="a red apple", negative_prompt="the moon", max_sequence_length=16)

Slots = Mapping[str, Any]


def load_config(pair: Pair) -> FluxPipelineConfig:
    """The checkpoint's pipeline config."""
    return FluxPipelineConfig.from_checkpoint(pair.ours.model.checkpoint)


def run(pair: Pair, service: str, slots: Slots, call: Call | None = None) -> Slots:
    """Run one service on artifacts by slot; returns its output slots."""
    return pair.ours.services[service].run(slots, call or RecordedCall().call())


@pytest.fixture(scope="module")
def prepared(dev: Pair) -> Slots:
    """All input slots of the denoising service."""
    given = {"prompt": PROMPT, "canvas": CANVAS, "sampling": SAMPLING}
    return {**given, **run(dev, "text_encoding", given), **run(dev, "latent_preparation", given)}


def test_contracts_are_the_ones_of_pipeline_composition() -> None:
    assert TextEncodingStage.contract == contracts.TEXT_ENCODING
    assert LatentPreparationStage.contract == contracts.LATENT_PREPARATION
    assert TimestepPreparationStage.contract == contracts.TIMESTEP_PREPARATION
    assert DenoisingStage.contract == contracts.DENOISING
    assert DecodingStage.contract == contracts.DECODING


def test_each_parameter_of_forward_has_one_source(dev: Pair, prepared: Slots) -> None:
    config = load_config(dev)
    conditioning = prepared["text_conditioning"].prompt_embeds
    own = config.prepare_pos_cond_kwargs(conditioning, {"image": (2, 16, 4, 6)}, SAMPLING)
    negative = config.prepare_neg_cond_kwargs(conditioning, {"image": (2, 16, 4, 6)}, SAMPLING)
    assert own.keys() == negative.keys()
    assert not own.keys() & conditioning.keys()
    parameters = inspect.signature(FluxTransformer2DModel.forward).parameters.keys() - {"self"}
    assert own.keys() | conditioning.keys() | {"hidden_states", "timestep"} == parameters


def test_conditioning_has_one_row_for_all_outputs(prepared: Slots) -> None:
    for embeds in (prepared["text_conditioning"].prompt_embeds, prepared["text_conditioning"].negative_prompt_embeds):
        assert {name: tuple(value.shape) for name, value in embeds.items()} == {
            "pooled_projections": (1, 24),
            "encoder_hidden_states": (1, 16, 32),
        }


@pytest.mark.parametrize(
    ("negative_prompt", "scale", "encoded"),
    [(None, 5.0, False), ("x", 1.0, False), ("x", None, False), ("", 1.1, True)],
)
def test_the_negative_prompt_is_encoded_only_with_guidance(
    dev: Pair, negative_prompt: str | None, scale: float | None, encoded: bool
) -> None:
    prompt = dataclasses.replace(PROMPT, negative_prompt=negative_prompt)
    sampling = dataclasses.replace(SAMPLING, true_cfg_scale=scale)
    made = run(dev, "text_encoding", {"prompt": prompt, "sampling": sampling})["text_conditioning"]
    assert bool(made.negative_prompt_embeds) == encoded


def test_truncated_text_is_reported(dev: Pair) -> None:
    recorded = RecordedCall()
    prompt = Prompt(
        prompt="the cat " * 60, prompt_2="a b c d", negative_prompt="red " * 9 + "moon", max_sequence_length=4
    )
    run(dev, "text_encoding", {"prompt": prompt, "sampling": SAMPLING}, recorded.call())
    assert [field for field, _ in recorded.warnings] == ["prompt", "prompt_2", "negative_prompt"]
    clip, t5, negative = (message for _, message in recorded.warnings)
    assert "truncated to 77" in clip
    assert clip.endswith("removed: " + ("the cat " * 60).split(" ", 75)[-1].strip())
    assert "truncated to 4" in t5
    assert t5.endswith("removed: c d")
    assert negative.endswith("red moon")


def test_the_report_of_very_long_text_is_shortened(dev: Pair) -> None:
    recorded = RecordedCall()
    run(dev, "text_encoding", {"prompt": Prompt(prompt="the cat " * 4000), "sampling": SAMPLING}, recorded.call())
    assert [len(message) < 2200 for _, message in recorded.warnings] == [True, True]


def test_text_of_maximum_length_is_not_reported(dev: Pair) -> None:
    recorded = RecordedCall()
    prompt = Prompt(prompt="the " * 75, prompt_2="a red cat", max_sequence_length=4)
    run(dev, "text_encoding", {"prompt": prompt, "sampling": SAMPLING}, recorded.call())
    assert recorded.warnings == []


def test_noise_equals_diffusers(dev: Pair, prepared: Slots) -> None:
    generator = torch.Generator("cpu").manual_seed(SAMPLING.seed)
    theirs, _ = dev.theirs.prepare_latents(2, 16, 32, 48, torch.float32, "cpu", generator)
    part = prepared["initial_latents"].parts["image"]
    assert torch.equal(part.latents, theirs)
    assert part.raw_latent_shape == (2, 16, 4, 6)
    stage = LatentPreparationStage(load_config(dev), Runtime(), {})
    drawn = stage.run(contracts.LatentPreparationInput(canvas=CANVAS, sampling=SAMPLING), Call("test"))
    assert drawn.latents_generator is not None
    assert torch.equal(drawn.latents_generator.state, generator.get_state())
    assert "latents_generator" not in prepared, "no later stage reads it"


def test_unpacking_inverts_packing(dev: Pair) -> None:
    config = load_config(dev)
    raw = torch.randn(2, 16, 4, 6)
    assert torch.equal(config.unpack("image", config.pack("image", raw), (2, 16, 4, 6)), raw)


def test_the_schedule_ends_at_zero(prepared: Slots) -> None:
    schedule = prepared["schedule"]
    assert schedule.num_inference_steps == STEPS
    assert schedule.timesteps.shape == (STEPS,)
    assert schedule.sigmas.shape == (STEPS + 1,)
    assert schedule.sigmas[0] == 1
    assert schedule.sigmas[-1] == 0


def test_a_fixed_shift_matches_its_formula(dev: Pair) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stage = TimestepPreparationStage(load_config(dev), Runtime(), {"scheduler": scheduler})
    given = contracts.TimestepPreparationInput(canvas=CANVAS, sampling=SAMPLING)
    sigmas = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    torch.testing.assert_close(stage.run(given, Call("test")).schedule.sigmas, 3 * sigmas / (1 + 2 * sigmas))


def test_requests_do_not_affect_later_requests(dev: Pair, prepared: Slots) -> None:
    first = run(dev, "denoising", prepared)["denoised_latents"].parts["image"].latents
    other = {**prepared, "sampling": dataclasses.replace(SAMPLING, guidance_scale=1.0)}
    run(dev, "denoising", other)
    assert torch.equal(run(dev, "denoising", prepared)["denoised_latents"].parts["image"].latents, first)


def test_resuming_after_any_step_gives_the_same_bytes(dev: Pair, prepared: Slots) -> None:
    whole = run(dev, "denoising", prepared)["denoised_latents"].parts["image"].latents
    states: list[StepCheckpoint] = []
    stage = checkpointing_stage(dev)
    stage.run(prepared, Call("test", on_item=step_checkpoints_to(states.append)))
    assert [state.step for state in states] == list(range(1, STEPS))
    start = StepCheckpoint(step=0, latents=prepared["initial_latents"], generator=prepared.get("latents_generator"))
    for state in [start, *states]:
        recorded = RecordedCall()
        resumed = run(dev, "denoising", {**prepared, "resume_from": traveled(state)}, recorded.call())
        assert torch.equal(resumed["denoised_latents"].parts["image"].latents, whole)
        assert [step for step, _ in recorded.progress] == list(range(state.step + 1, STEPS + 1))


def traveled(state: StepCheckpoint) -> StepCheckpoint:
    """The step checkpoint after serialization and parsing, as received by another worker."""
    packet = pack("checkpoint", state, TORCH).renamed("checkpoint", "resume_from")
    return unpack("resume_from", StepCheckpoint, packet, TORCH)


def checkpointing_stage(pair: Pair) -> HostedStages:
    """The denoising service with a step checkpoint after every step."""
    model = pair.ours.model
    spec = model.service("denoising")
    (stage,) = load_stages(
        model, spec, Runtime(device=torch.device("cpu"), dtype=torch.float32, step_checkpoint_every=1)
    )
    return HostedStages("denoising", [stage])


@pytest.mark.parametrize("step", [-1, STEPS + 1])
def test_resuming_outside_the_schedule_is_refused(dev: Pair, prepared: Slots, step: int) -> None:
    state = StepCheckpoint(step=step, latents=prepared["initial_latents"])
    with pytest.raises(InvalidInput) as caught:
        run(dev, "denoising", {**prepared, "resume_from": state})
    assert caught.value.field == "resume_from.step"


def test_resuming_with_latents_of_another_size_is_refused(dev: Pair, prepared: Slots) -> None:
    part = prepared["initial_latents"].parts["image"]
    smaller = dataclasses.replace(part, latents=part.latents[:1])
    state = StepCheckpoint(step=1, latents=Latents(parts={"image": smaller}))
    with pytest.raises(InvalidInput) as caught:
        run(dev, "denoising", {**prepared, "resume_from": state})
    assert caught.value.field == "resume_from.latents"


def test_resuming_with_the_state_of_another_solver_is_refused(dev: Pair, prepared: Slots) -> None:
    state = StepCheckpoint(step=1, latents=prepared["initial_latents"], solver={"last_sample": torch.zeros(1)})
    with pytest.raises(InvalidInput, match="last_sample"):
        run(dev, "denoising", {**prepared, "resume_from": state})


def test_cancellation_ends_the_loop_within_a_step(dev: Pair, prepared: Slots) -> None:
    cancelled, steps = threading.Event(), []

    def on_progress(step: int, _: int) -> None:
        steps.append(step)
        if step == 2:
            cancelled.set()

    with pytest.raises(Cancelled):
        run(dev, "denoising", prepared, Call("test", on_progress=on_progress, cancelled=cancelled))
    assert steps == [1, 2]


def test_conditioning_of_text_and_images_is_merged() -> None:
    text = Conditioning(prompt_embeds={"a": torch.ones(1)}, negative_prompt_embeds={"a": torch.zeros(1)})
    image = Conditioning(prompt_embeds={"b": torch.ones(2)})
    assert merge_conditioning(text, None) is text
    merged = merge_conditioning(text, image)
    assert merged.prompt_embeds.keys() == {"a", "b"}
    assert merged.negative_prompt_embeds.keys() == {"a", "b"}, "the negative branch has the same images"
    without = merge_conditioning(Conditioning(prompt_embeds=text.prompt_embeds), image)
    assert not without.negative_prompt_embeds, "images alone do not add a negative branch"
    with pytest.raises(InvalidInput, match="'a'"):
        merge_conditioning(text, text)


def test_an_image_model_refuses_mp4(dev: Pair, prepared: Slots) -> None:
    slots = {
        "denoised_latents": prepared["initial_latents"],
        "canvas": dataclasses.replace(CANVAS, output_format="mp4"),
    }
    with pytest.raises(InvalidInput) as caught:
        run(dev, "decoding", slots)
    assert caught.value.field == "output_format"


def test_nan_pixels_are_an_error(dev: Pair, prepared: Slots) -> None:
    noise = prepared["initial_latents"].parts["image"]
    broken = dataclasses.replace(noise, latents=torch.full_like(noise.latents, torch.nan))
    with pytest.raises(InternalError, match="pixels: the model returned non-finite values"):
        run(dev, "decoding", {"denoised_latents": Latents(parts={"image": broken}), "canvas": CANVAS})


def test_files_have_size_and_content_type(dev: Pair) -> None:
    png = dev.ours.media(prompt="a cat", height=32, width=48, num_inference_steps=1, seed=0, num_outputs_per_prompt=2)
    assert [(item.content_type, item.height, item.width) for item in png.items] == [("image/png", 32, 48)] * 2
    assert all(item.data.numpy().tobytes().startswith(b"\x89PNG") for item in png.items)
    (tensors,) = dev.ours.media(
        prompt="a cat", height=32, width=48, num_inference_steps=1, seed=0, output_format="safetensors"
    ).items
    assert tensors.content_type == "application/vnd.safetensors"


def test_noise_is_drawn_in_the_dtype_of_the_embeddings(dev: Pair) -> None:
    model = dev.ours.model
    spec = model.service("latent_preparation")
    stages = load_stages(model, spec, Runtime(device=torch.device("cpu"), dtype=torch.bfloat16))
    made = HostedStages("latent_preparation", stages).run({"canvas": CANVAS, "sampling": SAMPLING}, Call("test"))
    assert made["initial_latents"].parts["image"].latents.dtype == torch.bfloat16
    assert made["schedule"].sigmas.dtype == torch.float32
