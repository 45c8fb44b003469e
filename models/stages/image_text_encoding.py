"""Encodes a prompt together with the request's images to conditioning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.artifacts import Conditioning
from common.stage import Call, PipelineStage
from configs.models.encodings import PromptText
from configs.pipeline_configs.base import ImageTextConfig
from models.contracts import ImageTextEncodingInput, TextEncodingOutput
from models.encoder_runners.image_text import ImageTextEncoder
from models.images import open_images
from models.runtime import Runtime


class ImageTextEncodingStage(PipelineStage[ImageTextEncodingInput, TextEncodingOutput]):
    """Runs the model's encoder on the images with the prompt and, for guidance, the negative prompt."""

    indifferent_to = frozenset({"sampling.seed", "sampling.num_inference_steps"})

    def __init__(self, config: ImageTextConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._dtype = runtime.dtype
        encoding = config.image_text_encoding
        self._keyword = encoding.keyword
        self._encoder = ImageTextEncoder(
            encoding,
            tokenizer=modules[encoding.tokenizer],
            processor=modules[encoding.processor],
            encoder=modules[encoding.encoder],
            device=runtime.device,
        )

    @torch.inference_mode()
    def run(self, x: ImageTextEncodingInput, call: Call) -> TextEncodingOutput:
        """Conditioning of batch 1 on the CPU.

        Raises InvalidInput for undecodable images, and for texts that are too long or contain the image token.
        """
        call.check_cancelled()
        images = list(open_images(x.image_inputs).values())
        texts = [PromptText(field="prompt", text=x.prompt.prompt)]
        if self._config.wants_negative(x.prompt, x.sampling):
            texts.append(PromptText(field="negative_prompt", text=x.prompt.negative_prompt or ""))
        encoded: list[dict[str, Tensor]] = []
        for text in texts:
            call.check_cancelled()
            embeds = self._encoder.encode(text, images)
            encoded.append({self._keyword: embeds.to("cpu", self._dtype)})
        positive, *negative = encoded
        conditioning = Conditioning(prompt_embeds=positive, negative_prompt_embeds=negative[0] if negative else {})
        return TextEncodingOutput(text_conditioning=conditioning)
