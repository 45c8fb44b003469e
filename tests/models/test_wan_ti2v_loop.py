"""The denoising loop of Wan 2.2 TI2V for text and image: parity with Diffusers, and byte-equal resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from torch import Tensor

from common.artifacts import Canvas, Conditioning, LatentPart, Latents, Sampling, StepCheckpoint
from common.checkpoint import Checkpoint
from common.codec import pack, unpack
from common.errors import CheckpointError
from common.stage import Call
from common.tensors import TORCH
from configs.pipeline_configs.wan import WanPipelineConfig
from configs.pipeline_configs.wan_ti2v import WanTI2VImagePipelineConfig, WanTI2VPipelineConfig
from local_fleet import relative_error
from models.contracts import DenoisingInput, LatentPreparationInput, TimestepPreparationInput
from models.images import as_tensor
from models.loader import load_module
from models.runtime import Runtime
from models.stages.denoising import DenoisingStage
from models.stages.latent_preparation import LatentPreparationStage
from models.stages.timestep_preparation import TimestepPreparationStage
from step_checkpoints import step_checkpoints_to
from tiny_wan import TEXT_SIZE, build_tiny_wan_ti2v

STEPS = 4
WIDE = Canvas(height=64, width=96, num_frames=9, output_format="mp4")
TALL = Canvas(height=128, width=64, num_frames=5, output_format="mp4")
FRAME = Canvas(height=64, width=64, num_frames=1, output_format="mp4")
SAMPLING = Sampling(num_inference_steps=STEPS, seed=3, guidance_scale=4.0)
# Smaller than WIDE, with another aspect ratio.
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8))


@dataclass(frozen=True)
class Loop:
    """One variant of a checkpoint: this project's stages, and Diffusers' loop for the same request."""

    path: Path
    kind: type[WanTI2VPipelineConfig]
    dtype: torch.dtype = torch.float32

    @cached_property
    def config(self) -> WanTI2VPipelineConfig:
        return self.kind.from_checkpoint(Checkpoint.open(self.path))

    @cached_property
    def modules(self) -> Mapping[str, Any]:
        checkpoint = Checkpoint.open(self.path)
        runtime = Runtime(dtype=self.dtype)
        names = ("transformer", "scheduler", "vae")
        return {name: load_module(checkpoint, name, self.config, runtime) for name in names}

    def condition(self, canvas: Canvas) -> Tensor | None:
        """Latents of the input image."""
        if not isinstance(self.config, WanTI2VImagePipelineConfig):
            return None
        pixels = as_tensor(IMAGE, *self.config.image_size((IMAGE.height, IMAGE.width), canvas))
        with torch.inference_mode():
            (condition,) = self.config.image_latents(self.modules["vae"].encode, {"image": pixels}, canvas).values()
        return condition

    def inputs(self, canvas: Canvas = WIDE, sampling: Sampling = SAMPLING) -> DenoisingInput:
        """Inputs of the loop: outputs of the preceding stages, with random embeddings."""
        runtime, call = Runtime(dtype=self.dtype), Call("test")
        drawing = LatentPreparationInput(canvas=canvas, sampling=sampling)
        drawn = LatentPreparationStage(self.config, runtime, {}).run(drawing, call)
        timesteps = TimestepPreparationStage(self.config, runtime, {"scheduler": self.modules["scheduler"]})
        condition = self.condition(canvas)
        part = None if condition is None else LatentPart(latents=condition, raw_latent_shape=tuple(condition.shape))
        generator = torch.Generator("cpu").manual_seed(7)
        positive, negative = (torch.randn(1, 512, TEXT_SIZE, generator=generator).to(self.dtype) for _ in range(2))
        is_guided = (sampling.guidance_scale or 0.0) > 1
        return DenoisingInput(
            initial_latents=drawn.initial_latents,
            schedule=timesteps.run(TimestepPreparationInput(canvas=canvas, sampling=sampling), call).schedule,
            text_conditioning=Conditioning(
                prompt_embeds={"encoder_hidden_states": positive},
                negative_prompt_embeds={"encoder_hidden_states": negative} if is_guided else {},
            ),
            image_latents=None if part is None else Latents(parts={"condition": part}),
            sampling=sampling,
        )

    def run(self, x: DenoisingInput, states: list[StepCheckpoint] | None = None) -> Tensor:
        """Run the loop; returns its result and appends step checkpoints to `states`."""
        modules = {name: self.modules[name] for name in ("transformer", "scheduler")}
        stage = DenoisingStage(self.config, Runtime(dtype=self.dtype, step_checkpoint_every=1), modules)
        call = Call("test") if states is None else Call("test", on_item=step_checkpoints_to(states.append))
        return stage.run(x, call).denoised_latents.parts["video"].latents

    def reference(self, x: DenoisingInput, canvas: Canvas) -> tuple[Tensor, list[Tensor]]:
        """Run Diffusers' loop; returns the final latents, and the latents after each step."""
        pipeline_class: Any = WanPipeline if x.image_latents is None else WanImageToVideoPipeline
        pipeline = pipeline_class(
            tokenizer=None,
            text_encoder=None,
            vae=AutoencoderKLWan.from_pretrained(self.path / "vae"),
            transformer=WanTransformer3DModel.from_pretrained(self.path / "transformer"),
            scheduler=UniPCMultistepScheduler.from_pretrained(self.path / "scheduler"),
            expand_timesteps=True,
        )
        pipeline.set_progress_bar_config(disable=True)
        steps: list[Tensor] = []
        outputs = x.sampling.num_outputs_per_prompt
        embeds = {
            name: part["encoder_hidden_states"].repeat(outputs, 1, 1)
            for name, part in vars(x.text_conditioning).items()
            if part
        }
        with torch.inference_mode():
            (latents,) = pipeline(
                **embeds,
                **({} if x.image_latents is None else {"image": IMAGE}),
                height=canvas.height,
                width=canvas.width,
                num_frames=canvas.num_frames,
                num_inference_steps=STEPS,
                guidance_scale=x.sampling.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(x.sampling.seed),
                output_type="latent",
                return_dict=False,
                callback_on_step_end=_recorder(steps),
            )
        return latents, steps


def _recorder(steps: list[Tensor]) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    def record(_: Any, __: int, ___: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(given["latents"].clone())
        return {}

    return record


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return build_tiny_wan_ti2v(tmp_path_factory.mktemp("wan") / "ti2v")


@pytest.fixture(scope="module")
def text(path: Path) -> Loop:
    return Loop(path, WanTI2VPipelineConfig)


@pytest.fixture(scope="module")
def image(path: Path) -> Loop:
    return Loop(path, WanTI2VImagePipelineConfig)


CASES = pytest.mark.parametrize(
    ("canvas", "guidance_scale", "outputs"),
    [(WIDE, 4.0, 1), (TALL, 1.0, 2), (FRAME, 4.0, 2)],
    ids=["wide", "tall-unguided-two-outputs", "one-frame"],
)


def request(loop: Loop, canvas: Canvas, guidance_scale: float, outputs: int) -> DenoisingInput:
    sampling = Sampling(
        num_inference_steps=STEPS, seed=5, guidance_scale=guidance_scale, num_outputs_per_prompt=outputs
    )
    return loop.inputs(canvas, sampling)


@CASES
@pytest.mark.parametrize("kind", ["text", "image"])
def test_latents_match_diffusers(path: Path, kind: str, canvas: Canvas, guidance_scale: float, outputs: int) -> None:
    """Latents match after each step and at the end. They include the first frame, which the loop also denoises."""
    loop = Loop(path, WanTI2VPipelineConfig if kind == "text" else WanTI2VImagePipelineConfig)
    x = request(loop, canvas, guidance_scale, outputs)
    states: list[StepCheckpoint] = []
    got = loop.run(x, states)
    expected, steps = loop.reference(x, canvas)
    assert relative_error(got, expected) <= 1e-4
    for state, theirs in zip(states, steps[:-1], strict=True):
        assert relative_error(state.latents.parts["video"].latents, theirs) <= 1e-4, f"after step {state.step}"


def test_a_loop_resumes_after_every_step_to_the_same_bytes(text: Loop, image: Loop) -> None:
    """Step checkpoints, which include the solver's history, are serialized and parsed."""
    for loop in (text, image):
        x = loop.inputs()
        states: list[StepCheckpoint] = []
        whole = loop.run(x, states)
        assert [state.step for state in states] == [*range(1, STEPS)]
        for state in states:
            sent = unpack("state", StepCheckpoint, pack("state", state, TORCH), TORCH)
            resumed = DenoisingInput(**vars(x) | {"resume_from": sent})
            assert torch.equal(loop.run(resumed), whole), f"after step {state.step}"


def test_the_image_replaces_the_first_frame_only_in_the_result(image: Loop) -> None:
    x = image.inputs()
    states: list[StepCheckpoint] = []
    got = image.run(x, states)
    assert x.image_latents is not None
    condition = x.image_latents.parts["condition"].latents
    assert condition.dtype == torch.float32
    assert torch.equal(got[:, :, :1], condition)
    for state in states:
        assert relative_error(state.latents.parts["video"].latents[:, :, :1], condition) > 0.1, (
            "the loop denoises its own first frame"
        )


def test_the_loops_first_frame_is_not_an_input_of_the_denoiser(image: Loop) -> None:
    x = image.inputs()
    part = x.initial_latents.parts["video"]
    other = part.latents.clone()
    other[:, :, 0] += 1
    changed = Latents(parts={"video": LatentPart(latents=other, raw_latent_shape=part.raw_latent_shape)})
    assert torch.equal(image.run(DenoisingInput(**vars(x) | {"initial_latents": changed})), image.run(x))


def test_the_image_changes_the_later_frames(image: Loop) -> None:
    x = image.inputs()
    assert x.image_latents is not None
    part = x.image_latents.parts["condition"]
    other = LatentPart(latents=part.latents.flip(1), raw_latent_shape=part.raw_latent_shape)
    changed = DenoisingInput(**vars(x) | {"image_latents": Latents(parts={"condition": other})})
    assert relative_error(image.run(changed)[:, :, 1:], image.run(x)[:, :, 1:]) > 1e-2


def test_bfloat16_keeps_latents_and_image_in_float32(path: Path) -> None:
    loop = Loop(path, WanTI2VImagePipelineConfig, torch.bfloat16)
    x = loop.inputs()
    got = loop.run(x)
    assert x.image_latents is not None
    assert got.dtype == torch.float32
    assert torch.equal(got[:, :, :1], x.image_latents.parts["condition"].latents)
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("canvas", [WIDE, TALL, FRAME])
def test_image_latents_of_a_warm_up_have_the_shapes_of_encoded_images(image: Loop, canvas: Canvas) -> None:
    condition = image.condition(canvas)
    assert condition is not None
    assert image.config.condition_shapes(canvas) == {"condition": tuple(condition.shape)}


def test_latent_shapes_match_the_published_size(image: Loop) -> None:
    """16 pixels per latent, as in the published checkpoint."""
    config = image.config
    canvas = Canvas(height=704, width=1280, num_frames=121)
    assert config.raw_latent_shapes(canvas, 2) == {"video": (2, 48, 31, 44, 80)}
    assert config.condition_shapes(canvas) == {"condition": (1, 48, 1, 44, 80)}


def test_the_timestep_of_the_image_is_zero(text: Loop, image: Loop) -> None:
    timesteps = torch.tensor([[999, 999], [500, 500]])
    assert torch.equal(text.config.model_timestep(timesteps), timesteps)
    assert image.config.model_timestep(timesteps).tolist() == [[[0, 999]] * 2, [[0, 500]] * 2]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_dim": 24, "added_kv_proj_dim": 64}, "image_dim: 24 is not null"),
        ({"patch_size": [2, 2, 2]}, r"patch_size: \[2, 2, 2\] is not \[1, 2, 2\]"),
        ({"in_channels": 100}, "100 input and 48 output channels are not 48 and 48"),
    ],
)
@pytest.mark.parametrize("kind", [WanTI2VPipelineConfig, WanTI2VImagePipelineConfig])
def test_unsupported_transformers_are_refused(
    tmp_path: Path, kind: type[WanPipelineConfig], entry: dict[str, Any], message: str
) -> None:
    path = build_tiny_wan_ti2v(tmp_path / "m")
    file = path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    with pytest.raises(CheckpointError, match=message):
        kind.from_checkpoint(Checkpoint.open(path))
