"""GLM-Image before denoising: prior tokens, glyph encoding, noise and the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from common.artifacts import Conditioning
from common.stage import Call, PipelineStage
from configs.pipeline_configs.glm_image import GlmImagePipelineConfig
from models.composition import SCHEDULER
from models.contracts import (
    BeforeDenoisingInput,
    BeforeDenoisingOutput,
    LatentPreparationInput,
    TimestepPreparationInput,
)
from models.encoder_runners.glyphs import GlyphEncoder
from models.encoder_runners.prior_tokens import PriorTokenSampler
from models.runtime import Runtime
from models.stages.latent_preparation import LatentPreparationStage
from models.stages.timestep_preparation import TimestepPreparationStage


class GlmImageBeforeDenoisingStage(PipelineStage[BeforeDenoisingInput, BeforeDenoisingOutput]):
    """Samples prior tokens with the language model and encodes quoted texts.

    Runs the standard stages of latent and timestep preparation for noise and schedule.
    """

    def __init__(self, config: GlmImagePipelineConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._dtype = runtime.dtype
        self._glyphs = GlyphEncoder(modules["tokenizer"], modules["text_encoder"], runtime.device)
        self._prior = PriorTokenSampler(
            modules["processor"], modules["vision_language_encoder"], config.transformer.codebook_size, runtime.device
        )
        self._latents = LatentPreparationStage(config, runtime, {})
        self._timesteps = TimestepPreparationStage(config, runtime, {SCHEDULER: modules[SCHEDULER]})

    @torch.inference_mode()
    def run(self, x: BeforeDenoisingInput, call: Call) -> BeforeDenoisingOutput:
        """Conditioning of batch 1, the noise of all outputs, and the schedule, on the CPU.

        Reports every prior token, and ends within one token when cancelled. Raises InvalidInput for a prompt that
        contains image tokens or is too long, and for a seed with which the language model ends the image early or
        samples an unusable token.
        """
        schedule = self._timesteps.run(TimestepPreparationInput(canvas=x.canvas, sampling=x.sampling), call).schedule
        noise = self._latents.run(LatentPreparationInput(canvas=x.canvas, sampling=x.sampling), call).initial_latents
        conditioning = self._conditioning(x, call)
        return BeforeDenoisingOutput(text_conditioning=conditioning, initial_latents=noise, schedule=schedule)

    def _conditioning(self, x: BeforeDenoisingInput, call: Call) -> Conditioning:
        """Glyphs and prior tokens. The negative branch encodes an empty text; the denoiser drops its prior tokens."""
        length = self._config.max_glyph_tokens(x.prompt)
        glyphs = self._glyphs.encode(x.prompt.prompt, length, call.warn).to("cpu", self._dtype)
        rows, columns = self._config.prior_grid(x.canvas)
        tokens = self._prior.sample(x.prompt.prompt, (rows, columns), x.sampling.seed, call.progress)
        positive = {"encoder_hidden_states": glyphs, "prior_token_id": tokens}
        if not self._config.wants_negative(x.prompt, x.sampling):
            return Conditioning(prompt_embeds=positive)
        empty = self._glyphs.encode("", length, call.warn).to("cpu", self._dtype)
        return Conditioning(prompt_embeds=positive, negative_prompt_embeds={**positive, "encoder_hidden_states": empty})
