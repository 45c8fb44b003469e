"""DMD loops of tiny Wan checkpoints: our stages, and reference loops over Diffusers' transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from common.artifacts import Canvas, Conditioning, Latents, ParamValue, Sampling, StepCheckpoint
from common.checkpoint import Checkpoint
from common.stage import STEP_CHECKPOINTS, Call
from configs.pipeline_configs.wan_dmd import WanCausalDMDPipelineConfig, WanDMDPipelineConfig
from configs.sample.wan_dmd import WanCausalDMDSamplingParams, WanDMDSamplingParams
from models.contracts import DenoisingInput, LatentPreparationInput, TimestepPreparationInput
from models.loader import load_module
from models.runtime import Runtime
from models.stages.causal_dmd_denoising import BLOCKS, CausalDMDDenoisingStage
from models.stages.dmd_denoising import DmdDenoisingStage
from models.stages.latent_preparation import LatentPreparationStage
from models.stages.timestep_preparation import TimestepPreparationStage
from tiny_wan import LATENT_CHANNELS, TEXT_SIZE

SIZE: Mapping[str, int] = {"height": 32, "width": 48}


@dataclass
class RecordedCall:
    """Step checkpoints, blocks and steps that a stage reported, in order."""

    states: list[StepCheckpoint] = field(default_factory=list)
    blocks: list[tuple[int, Tensor]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)

    def call(self, on_progress: Callable[[int, int], None] | None = None) -> Call:
        """A Call whose callbacks append to this record."""

        def progress(step: int, total: int) -> None:
            self.steps.append((step, total))
            if on_progress is not None:
                on_progress(step, total)

        return Call("test", on_item=self._take, on_progress=progress)

    def _take(self, slot: str, index: int, item: Any) -> None:
        self.order.append(slot)
        if slot == STEP_CHECKPOINTS:
            self.states.append(item)
        else:
            assert slot == BLOCKS
            assert isinstance(item, Latents)
            part = item.parts["video"]
            assert tuple(part.latents.shape) == part.raw_latent_shape
            self.blocks.append((index, part.latents.clone()))

    @property
    def video(self) -> Tensor:
        """All blocks concatenated. Asserts that each block was emitted once, in order."""
        assert [index for index, _ in self.blocks] == list(range(len(self.blocks)))
        return torch.cat([block for _, block in self.blocks], dim=2)


@dataclass(frozen=True)
class DmdLoop:
    """A checkpoint and its denoising stage."""

    path: Path
    runtime: Runtime = field(default_factory=lambda: Runtime(step_checkpoint_every=1))

    config_class: ClassVar[type[WanDMDPipelineConfig]] = WanDMDPipelineConfig
    params_class: ClassVar[type[WanDMDSamplingParams]] = WanDMDSamplingParams

    @cached_property
    def config(self) -> WanDMDPipelineConfig:
        return self.config_class.from_checkpoint(Checkpoint.open(self.path))

    @cached_property
    def modules(self) -> dict[str, Any]:
        return {"transformer": load_module(Checkpoint.open(self.path), "transformer", self.config, self.runtime)}

    def inputs(self, num_frames: int, seed: int = 3, outputs: int = 1) -> DenoisingInput:
        """Inputs of the loop: outputs of the preceding stages, with random embeddings."""
        given: dict[str, ParamValue] = {
            "prompt": "",
            "seed": seed,
            "num_outputs_per_prompt": outputs,
            "num_frames": num_frames,
            **SIZE,
        }
        params, _ = self.params_class.build(given, Checkpoint.open(self.path))
        artifacts, call = params.artifacts(), Call("test")
        canvas, sampling = artifacts["canvas"], artifacts["sampling"]
        assert isinstance(canvas, Canvas)
        assert isinstance(sampling, Sampling)
        drawing = LatentPreparationInput(canvas=canvas, sampling=sampling)
        drawn = LatentPreparationStage(self.config, self.runtime, {}).run(drawing, call)
        timesteps = TimestepPreparationInput(canvas=canvas, sampling=sampling)
        text = torch.randn(1, 32, TEXT_SIZE, generator=torch.Generator("cpu").manual_seed(7))
        return DenoisingInput(
            initial_latents=drawn.initial_latents,
            latents_generator=drawn.latents_generator,
            schedule=TimestepPreparationStage(self.config, self.runtime, {}).run(timesteps, call).schedule,
            text_conditioning=Conditioning(prompt_embeds={"encoder_hidden_states": text}),
            sampling=sampling,
        )

    def stage(self) -> Any:
        return DmdDenoisingStage(self.config, self.runtime, self.modules)

    def run(self, x: DenoisingInput, recorded: RecordedCall | None = None) -> Tensor:
        """Run the loop; returns the latents of the whole video."""
        recorded = RecordedCall() if recorded is None else recorded
        done = DmdDenoisingStage(self.config, self.runtime, self.modules).run(x, recorded.call())
        return done.denoised_latents.parts["video"].latents


@dataclass(frozen=True)
class CausalLoop(DmdLoop):
    """A causal checkpoint and its denoising stage."""

    config_class: ClassVar[type[WanDMDPipelineConfig]] = WanCausalDMDPipelineConfig
    params_class: ClassVar[type[WanDMDSamplingParams]] = WanCausalDMDSamplingParams

    def stage(self) -> CausalDMDDenoisingStage:
        config = self.config
        assert isinstance(config, WanCausalDMDPipelineConfig)
        return CausalDMDDenoisingStage(config, self.runtime, self.modules)

    def run(self, x: DenoisingInput, recorded: RecordedCall | None = None) -> Tensor:
        recorded = RecordedCall() if recorded is None else recorded
        self.stage().run(x, recorded.call())
        return recorded.video


@dataclass(frozen=True)
class Request:
    """A request for the reference loops, which use no module of this project. `shape` is the latents' shape."""

    shape: tuple[int, ...]
    text: Tensor
    seed: int

    @classmethod
    def of(cls, x: DenoisingInput) -> Request:
        part = x.initial_latents.parts["video"]
        outputs = x.sampling.num_outputs_per_prompt
        text = x.text_conditioning.prompt_embeds["encoder_hidden_states"].repeat(outputs, 1, 1)
        return cls(tuple(part.latents.shape), text, x.sampling.seed)

    def noise(self, generator: torch.Generator, frames: int) -> Tensor:
        """Noise of `frames` latent frames, drawn as (batch, frames, channels, H, W) like in FastVideo."""
        batch, channels, _, *size = self.shape
        return torch.randn((batch, frames, channels, *size), generator=generator).transpose(1, 2)


@torch.no_grad()
def reference_dmd(path: Path, request: Request) -> Tensor:
    """FastWan's loop: timesteps 1000, 757 and 522 of the flow schedule with shift 8."""
    model = WanTransformer3DModel.from_pretrained(path / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=8.0)
    steps = (1000.0, 757.0, 522.0)
    levels = [scheduler.sigmas[int((scheduler.timesteps - step).abs().argmin())] for step in steps]
    generator = torch.Generator().manual_seed(request.seed)
    latents = torch.randn(request.shape, generator=generator)
    for number, step in enumerate(steps):
        timestep = torch.full((len(latents),), step)
        velocity = model(latents, timestep, request.text, return_dict=False)[0]
        clean: Tensor = latents - levels[number] * velocity
        if number + 1 == len(steps):
            return clean
        noise = request.noise(generator, latents.shape[2])
        latents = (1 - levels[number + 1]) * clean + levels[number + 1] * noise
    raise AssertionError("the last step returns")


class MaskedSelfAttention(WanAttnProcessor):  # type: ignore[misc]  # Diffusers' class has no types
    """Diffusers' attention processor with a self-attention mask (queries, keys)."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None, mask: Any, rotary: Any = None
    ) -> Tensor:
        assert mask is None
        mask = self.mask if encoder_hidden_states is None else None
        attended: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary)
        return attended


def block_mask(frames: int, tokens: int, block: int, window: int | None, sink: int) -> Tensor:
    """Attention mask (queries, keys): tokens of a frame attend to all frames up to the end of its block.

    With a window, tokens attend to the sink frames and the latest frames, `window` frames in total.
    """
    allowed = torch.zeros(frames, frames, dtype=torch.bool)
    for query in range(frames):
        end = (query // block + 1) * block
        for key in range(end):
            is_near = window is None or key >= end - (window - sink)
            allowed[query, key] = is_near or key < sink
    return allowed.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


@torch.no_grad()
def reference_causal(path: Path, request: Request, block: int, window: int | None = None, sink: int = 0) -> Tensor:
    """Self Forcing's loop without a KV cache: each step predicts all frames up to the end of its block.

    Finished frames are clean, at timestep 0, and do not attend to later blocks.
    """
    model = WanTransformer3DModel.from_pretrained(path / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    levels = [scheduler.sigmas[1000 - step] for step in (1000, 750, 500, 250)]
    generator = torch.Generator().manual_seed(request.seed)
    latents = torch.randn(request.shape, generator=generator)
    tokens = request.shape[3] * request.shape[4] // 4
    for first in range(0, request.shape[2], block):
        end = first + block
        for attention in (each.attn1 for each in model.blocks):
            attention.set_processor(MaskedSelfAttention(block_mask(end, tokens, block, window, sink)))
        for number, level in enumerate(levels):
            timestep = torch.zeros(len(latents), end * tokens)
            timestep[:, first * tokens :] = 1000 * level
            velocity = model(latents[:, :, :end], timestep, request.text, return_dict=False)[0][:, :, first:]
            clean = latents[:, :, first:end] - level * velocity
            if number + 1 < len(levels):
                noise = request.noise(generator, block)
                clean = (1 - levels[number + 1]) * clean + levels[number + 1] * noise
            latents[:, :, first:end] = clean
    assert latents.shape[1] == LATENT_CHANNELS
    return latents
