"""Qwen-Image-Layered before denoising: caption, text, image latents, noise and the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from common.artifacts import Canvas, ImageInputs, Prompt
from common.errors import InvalidInput
from common.stage import Call, PipelineStage
from configs.pipeline_configs.qwen_image_layered import QwenImageLayeredPipelineConfig
from models.composition import SCHEDULER
from models.contracts import (
    BeforeDenoisingInput,
    BeforeDenoisingOutput,
    ImageVAEEncodingInput,
    LatentPreparationInput,
    TextEncodingInput,
    TimestepPreparationInput,
)
from models.encoder_runners.captions import Captioner
from models.encoder_runners.text import shorten
from models.images import open_images
from models.runtime import Runtime
from models.stages.image_encoding import ImageVAEEncodingStage
from models.stages.latent_preparation import LatentPreparationStage
from models.stages.text_encoding import TextEncodingStage
from models.stages.timestep_preparation import TimestepPreparationStage

EMPTY_PROMPTS = ("", " ")
"""Prompts that are replaced by a caption of the image."""


class QwenImageLayeredBeforeDenoisingStage(PipelineStage[BeforeDenoisingInput, BeforeDenoisingOutput]):
    """Captions the image if the prompt is empty, then runs standard stages for everything else."""

    def __init__(self, config: QwenImageLayeredPipelineConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._config = config
        model, tokenizer = modules["text_encoder"], modules["tokenizer"]
        self._captioner = Captioner(tokenizer, modules["processor"], model, runtime.device)
        language_model = {"text_encoder": model.model.language_model, "tokenizer": tokenizer}
        self._text = TextEncodingStage(config, runtime, language_model)
        self._image = ImageVAEEncodingStage(config, runtime, {"vae": modules["vae"]})
        self._latents = LatentPreparationStage(config, runtime, {})
        self._timesteps = TimestepPreparationStage(config, runtime, {SCHEDULER: modules[SCHEDULER]})

    @torch.inference_mode()
    def run(self, x: BeforeDenoisingInput, call: Call) -> BeforeDenoisingOutput:
        """Conditioning and image latents of batch 1, the noise of all outputs, and the schedule, on the CPU.

        Reports every token of a caption, and the caption as a warning; ends within one token when cancelled. Raises
        InvalidInput for a missing or undecodable image.
        """
        if x.image_inputs is None:
            raise InvalidInput("image: no image was sent; an image to decompose into layers is required", field="image")
        canvas, sampling = x.canvas, x.sampling
        schedule = self._timesteps.run(TimestepPreparationInput(canvas=canvas, sampling=sampling), call).schedule
        noise = self._latents.run(LatentPreparationInput(canvas=canvas, sampling=sampling), call).initial_latents
        given = ImageVAEEncodingInput(image_inputs=x.image_inputs, canvas=canvas)
        image_latents = self._image.run(given, call).image_latents
        prompt = self._captioned(x, x.image_inputs, call) if x.prompt.prompt in EMPTY_PROMPTS else x.prompt
        text = self._text.run(TextEncodingInput(prompt=prompt, sampling=sampling), call).text_conditioning
        return BeforeDenoisingOutput(
            text_conditioning=text, initial_latents=noise, schedule=schedule, image_latents=image_latents
        )

    def _captioned(self, x: BeforeDenoisingInput, images: ImageInputs, call: Call) -> Prompt:
        """The request's prompt with a caption of the image, which is resized to the size of a layer."""
        caption = self._captioner.caption(
            self._resized(images, x.canvas), call.progress, in_english=bool(x.sampling.params.get("use_en_prompt"))
        )
        call.warn("prompt", f"the prompt is empty; a caption of the image is used instead: {shorten(caption)}")
        return replace(x.prompt, prompt=caption)

    def _resized(self, images: ImageInputs, canvas: Canvas) -> Image.Image:
        (image,) = open_images(images, self._config.image_mode).values()
        return image.resize((canvas.width, canvas.height), Image.Resampling.LANCZOS)
