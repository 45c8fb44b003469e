"""Stages of the toy family: simple arithmetic with the artifacts and callbacks of a real family."""

# ruff: noqa: ARG002  (the signatures of stages are fixed)
from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from common.artifacts import Conditioning, LatentPart, Latents, Media, MediaItem, Schedule, StepCheckpoint
from common.stage import Call, PipelineStage
from configs.pipeline_configs.base import PipelineConfig
from models import contracts
from models.runtime import Runtime

_MAX_BYTES = 64


class ToyTextEncodingStage(PipelineStage[contracts.TextEncodingInput, contracts.TextEncodingOutput]):
    """Computes the mean palette entry of the prompt's first 64 bytes: color (1, 3)."""

    def __init__(self, config: PipelineConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._palette: Tensor = modules["palette"]

    def run(self, x: contracts.TextEncodingInput, call: Call) -> contracts.TextEncodingOutput:
        """Encode the prompt; warns if it is truncated."""
        data = x.prompt.prompt.encode()
        if len(data) > _MAX_BYTES:
            call.warn("prompt", f"only the first {_MAX_BYTES} of {len(data)} bytes are read")
        rows = self._palette[list(data[:_MAX_BYTES]) or [0]]
        color = rows.mean(0, keepdim=True).cpu()
        return contracts.TextEncodingOutput(text_conditioning=Conditioning(prompt_embeds={"color": color}))


class ToyLatentPreparationStage(PipelineStage[contracts.LatentPreparationInput, contracts.LatentPreparationOutput]):
    """Draws noise of shape (outputs, 3, height / cell, width / cell)."""

    def __init__(self, config: Any, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._cell: int = config.cell

    def run(self, x: contracts.LatentPreparationInput, call: Call) -> contracts.LatentPreparationOutput:
        """Draw on the CPU."""
        generator = torch.Generator("cpu").manual_seed(x.sampling.seed)
        cell = self._cell
        shape = (x.sampling.num_outputs_per_prompt, 3, x.canvas.height // cell, x.canvas.width // cell)
        noise = torch.randn(shape, generator=generator)
        return contracts.LatentPreparationOutput(initial_latents=_latents(noise))


class ToyTimestepPreparationStage(
    PipelineStage[contracts.TimestepPreparationInput, contracts.TimestepPreparationOutput]
):
    """Computes evenly spaced steps from 1 to 0."""

    def __init__(self, config: PipelineConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        pass

    def run(self, x: contracts.TimestepPreparationInput, call: Call) -> contracts.TimestepPreparationOutput:
        """Compute the schedule."""
        steps = x.sampling.num_inference_steps
        sigmas = torch.linspace(1, 0, steps + 1)
        schedule = Schedule(timesteps=sigmas[:-1] * 1000, sigmas=sigmas, num_inference_steps=steps)
        return contracts.TimestepPreparationOutput(schedule=schedule)


class ToyDenoisingStage(PipelineStage[contracts.DenoisingInput, contracts.DenoisingOutput]):
    """Moves the noise towards the color step by step, with a step checkpoint after each step."""

    def __init__(self, config: PipelineConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._gain: Tensor = modules["gain"]

    def run(self, x: contracts.DenoisingInput, call: Call) -> contracts.DenoisingOutput:
        """Run all steps of the schedule; a higher parameter "contrast" preserves more of the noise."""
        start = 0 if x.resume_from is None else x.resume_from.step
        before = x.initial_latents if x.resume_from is None else x.resume_from.latents
        latents = before.parts["image"].latents
        color = x.text_conditioning.prompt_embeds["color"].float().view(1, 3, 1, 1)
        contrast = x.sampling.params["contrast"]
        assert isinstance(contrast, float)
        gain = self._gain.float().cpu().view(1, 3, 1, 1) / (0.5 + contrast)
        total = x.schedule.num_inference_steps
        for step in range(start, total):
            width = x.schedule.sigmas[step] - x.schedule.sigmas[step + 1]
            latents = latents + width * gain * (color - latents)
            call.checkpoint(StepCheckpoint(step=step + 1, latents=_latents(latents)))
            call.progress(step + 1, total)
        return contracts.DenoisingOutput(denoised_latents=_latents(latents))


class ToyDecodingStage(PipelineStage[contracts.DecodingInput, contracts.DecodingOutput]):
    """Converts every latent to a square of one color."""

    def __init__(self, config: Any, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._cell: int = config.cell

    def run(self, x: contracts.DecodingInput, call: Call) -> contracts.DecodingOutput:
        """Encode PNG files, or one safetensors file."""
        latents = x.denoised_latents.parts["image"].latents
        cells = (latents / 4 + 0.5).clamp(0, 1)
        pixels = cells.repeat_interleave(self._cell, 2).repeat_interleave(self._cell, 3).contiguous()
        if x.canvas.output_format == "safetensors":
            files = [save({"latents": latents.contiguous(), "pixels": pixels})]
        else:
            files = [_png(each) for each in pixels]
        kind = "image/png" if x.canvas.output_format == "png" else "application/vnd.safetensors"
        call.progress(1, 1)
        items = [
            MediaItem(
                data=torch.frombuffer(bytearray(file), dtype=torch.uint8),
                content_type=kind,
                height=x.canvas.height,
                width=x.canvas.width,
            )
            for file in files
        ]
        return contracts.DecodingOutput(media=Media(items=tuple(items)))


def _latents(tensor: Tensor) -> Latents:
    return Latents(parts={"image": LatentPart(latents=tensor, raw_latent_shape=tuple(tensor.shape))})


def _png(pixels: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray((pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()).save(file, "PNG")
    return file.getvalue()
