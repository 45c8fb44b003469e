"""Stages of the twin family: a text encoder with cached replies, an image encoder and a denoiser."""

# ruff: noqa: ARG002  (the signatures of stages are fixed)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from toy_stages import ToyDenoisingStage, ToyTextEncodingStage

from common.artifacts import Conditioning, LatentPart, Latents
from common.stage import Call, PipelineStage
from models import contracts
from models.images import as_tensor, open_images
from models.runtime import Runtime


class TwinTextEncodingStage(ToyTextEncodingStage):
    """Computes the toy family's color with the variant's brightness."""

    indifferent_to = frozenset({"sampling.seed"})

    def __init__(self, config: Any, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        super().__init__(config, runtime, modules)
        self._brightness: float = config.brightness

    def run(self, x: contracts.TextEncodingInput, call: Call) -> contracts.TextEncodingOutput:
        """Encode the prompt."""
        color = super().run(x, call).text_conditioning.prompt_embeds["color"] * self._brightness
        return contracts.TextEncodingOutput(text_conditioning=Conditioning(prompt_embeds={"color": color}))


class TwinImageEncodingStage(PipelineStage[contracts.ImageVAEEncodingInput, contracts.ImageVAEEncodingOutput]):
    """Computes the mean color of all images through the lens: the part "condition", (1, 3)."""

    def __init__(self, config: Any, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._lens: Tensor = modules["lens"]

    def run(self, x: contracts.ImageVAEEncodingInput, call: Call) -> contracts.ImageVAEEncodingOutput:
        """Encode all images, resized to the canvas."""
        tensors = [as_tensor(each, x.canvas.height, x.canvas.width) for each in open_images(x.image_inputs).values()]
        color = torch.cat(tensors).mean((0, 2, 3)) * self._lens.float().cpu()
        part = LatentPart(latents=color[None], raw_latent_shape=(1, 3))
        return contracts.ImageVAEEncodingOutput(image_latents=Latents(parts={"condition": part}))


class TwinDenoisingStage(ToyDenoisingStage):
    """The toy family's loop, towards a color tinted by the image."""

    def __init__(self, config: Any, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        super().__init__(config, runtime, modules)
        self._tint: float = config.tint

    def run(self, x: contracts.DenoisingInput, call: Call) -> contracts.DenoisingOutput:
        """Run all steps of the schedule; the parameter "strength" is the weight of the image."""
        assert x.image_latents is not None, "the variant with an image"
        strength = x.sampling.params["strength"]
        assert isinstance(strength, float)
        tint = x.image_latents.parts["condition"].latents * self._tint * strength
        color = x.text_conditioning.prompt_embeds["color"].float() + tint
        return super().run(replace(x, text_conditioning=Conditioning(prompt_embeds={"color": color})), call)
