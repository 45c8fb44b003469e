"""Runs a language model on text and pictures together, as its ImageTextEncoding describes it."""

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
    """A tokenizer, a processor of pictures and an encoder that fit together, else it raises CheckpointError."""

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

    def encode(self, source: PromptText, pictures: Sequence[Image.Image]) -> Tensor:
        """The states from the template's skipped tokens on, (1, tokens, size); the picture's tokens are among them.

        Raises InvalidInput for text that the denoiser has no positions for, or that holds the picture's mark.
        """
        encoding = self._encoding
        if encoding.picture_mark in source.text:
            raise InvalidInput(f"{source.field} must not hold {encoding.picture_mark}", field=source.field)
        resized = [self._resized(picture) for picture in pictures]
        seen = self._processor(images=resized, return_tensors="pt")
        template = encoding.template(len(pictures))
        before, *between = template.before.split(encoding.picture_mark)
        for grid, following in zip(seen.image_grid_thw, between, strict=True):
            tokens = int(grid.prod()) // self._processor.merge_size**2
            before += encoding.picture_mark * tokens + following
        whole = self._tokenizer(before + source.text + template.after, return_tensors="pt").input_ids
        length = whole.shape[1] - template.skipped
        most = min(encoding.most_tokens(picture.height, picture.width) for picture in pictures)
        if length > most:
            message = f"{source.field} is too long: with the picture it has {length} tokens, and at most {most} fit"
            raise InvalidInput(message, field=source.field)
        output = self._encoder(
            input_ids=whole.to(self._device),
            pixel_values=seen.pixel_values.to(self._device),
            image_grid_thw=seen.image_grid_thw.to(self._device),
        )
        hidden: Tensor = output.last_hidden_state
        return hidden[:, template.skipped :]

    def _resized(self, picture: Image.Image) -> Image.Image:
        height, width = self._encoding.picture_size(picture.height, picture.width)
        return picture.resize((width, height), Image.Resampling.LANCZOS)
