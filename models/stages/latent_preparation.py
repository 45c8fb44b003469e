"""Draws the initial noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from common.artifacts import Generator, LatentPart, Latents
from common.stage import Call, PipelineStage
from configs.pipeline_configs.base import PreparationConfig
from models.contracts import LatentPreparationInput, LatentPreparationOutput
from models.runtime import Runtime
from models.stages.first_draw import first_draw


class LatentPreparationStage(PipelineStage[LatentPreparationInput, LatentPreparationOutput]):
    """Draws each latent part once, for all outputs, with a CPU generator as in Diffusers."""

    def __init__(self, config: PreparationConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:  # noqa: ARG002  (all stages have one signature)
        self._config = config
        self._dtype = config.noise_dtype(runtime.dtype)
        self._vae_dtype = config.dtype_of("vae", runtime.dtype)

    @torch.inference_mode()
    def run(self, x: LatentPreparationInput, call: Call) -> LatentPreparationOutput:
        """The noise in the denoiser's layout and, if the pipeline reads it, the generator after the draw."""
        call.check_cancelled()
        _, generator = first_draw(self._config, x.canvas, x.sampling.seed, self._vae_dtype)
        parts: dict[str, LatentPart] = {}
        for part, shape in self._config.raw_latent_shapes(x.canvas, x.sampling.num_outputs_per_prompt).items():
            noise = torch.randn(shape, generator=generator, dtype=self._dtype)
            parts[part] = LatentPart(latents=self._config.pack(part, noise), raw_latent_shape=shape)
        latents = Latents(parts=parts)
        if not self.writes("latents_generator"):
            return LatentPreparationOutput(initial_latents=latents)
        drawn = Generator(seed=x.sampling.seed, state=generator.get_state())
        return LatentPreparationOutput(initial_latents=latents, latents_generator=drawn)
