"""Runs a vision-language model on text and images as configured by an ImageTextEncoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.errors import InvalidInput
from configs.models.encodings import ImageTextEncoding, PromptText
from models.encoder_runners.checks import check_patch_processor, check_tokenizer


class ImageTextEncoder:
    """A tokenizer, an image processor and an encoder. Raises CheckpointError if they are incompatible."""

    def __init__(
        self, encoding: ImageTextEncoding, tokenizer: Any, processor: Any, encoder: Any, device: torch.device
    ) -> None:
        self._encoding = encoding
        self._tokenizer = tokenizer
        self._processor = processor
        self._encoder = encoder
        self._device = device
        known = encoder.get_input_embeddings().num_embeddings
        check_tokenizer(encoding.tokenizer, tokenizer, encoding.encoder, known)
        check_patch_processor(encoding.processor, processor, encoding.encoder, encoder)

    def encode(self, source: PromptText, images: Sequence[Image.Image]) -> Tensor:
        """Hidden states (1, tokens, size) after the template's skipped tokens, including the images' tokens.

        Raises InvalidInput for a text that contains the image token or exceeds the denoiser's text positions.
        """
        encoding = self._encoding
        if encoding.image_token in source.text:
            raise InvalidInput(
                f"{source.field}: {encoding.image_token} is not allowed; text without the model's image token works",
                field=source.field,
            )
        resized = [self._resized(image) for image in images]
        seen = self._processor(images=resized, return_tensors="pt")
        template = encoding.template(len(images))
        before, *between = template.before.split(encoding.image_token)
        for grid, following in zip(seen.image_grid_thw, between, strict=True):
            tokens = int(grid.prod()) // self._processor.merge_size**2
            before += encoding.image_token * tokens + following
        whole = self._tokenizer(before + source.text + template.after, return_tensors="pt").input_ids
        length = whole.shape[1] - template.skipped
        limit = min(encoding.max_tokens(image.height, image.width) for image in images)
        if length > limit:
            message = f"{source.field}: {length} tokens, including image tokens, are not at most {limit}"
            raise InvalidInput(f"{message}; a shorter text works", field=source.field)
        output = self._encoder(
            input_ids=whole.to(self._device),
            pixel_values=seen.pixel_values.to(self._device),
            image_grid_thw=seen.image_grid_thw.to(self._device),
        )
        hidden: Tensor = output.last_hidden_state
        return hidden[:, template.skipped :]

    def _resized(self, image: Image.Image) -> Image.Image:
        height, width = self._encoding.image_size(image.height, image.width)
        return image.resize((width, height), Image.Resampling.LANCZOS)
