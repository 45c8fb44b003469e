"""Runs one text encoder as its TextEncoding describes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.errors import CheckpointError
from configs.models.encodings import PromptText, Template, TextEncoding
from models.encoder_runners.checks import check_tokenizer

if TYPE_CHECKING:
    from common.artifacts import Prompt

Warn = Callable[[str, str], None]

MOST_TOLD = 2000


class TextEncoder:
    """A tokenizer and an encoder of transformers. Raises CheckpointError when the two do not fit."""

    def __init__(self, encoding: TextEncoding, tokenizer: Any, encoder: Any, device: torch.device) -> None:
        self._encoding = encoding
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._device = device
        self._check()

    def _check(self) -> None:
        names, config = self._encoding, self._encoder.config.to_dict()
        check_tokenizer(names.tokenizer, self._tokenizer, names.encoder, config["vocab_size"])
        longest, positions = self._tokenizer.model_max_length, config.get("max_position_embeddings")
        if names.template is None and positions is not None and longest > positions:
            raise CheckpointError(
                f"{names.tokenizer} makes up to {longest} tokens, but {names.encoder} has {positions} positions"
            )

    def encode(self, prompt: Prompt, warn: Warn) -> Tensor:
        """What the denoiser gets, batch 1. A text that is too long is cut; warn(field, message) says what was lost."""
        source = self._encoding.text(prompt)
        if self._encoding.template is not None:
            return self._encode_in_template(self._encoding.template, source, prompt, warn)
        limit = self._encoding.max_length(prompt) or self._tokenizer.model_max_length
        tokens = self._tokenizer(
            source.text,
            padding="max_length",
            max_length=limit,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self._device)
        whole = self._tokenizer(source.text, return_tensors="pt", verbose=False).input_ids
        if whole.shape[1] > limit:
            # The last token that fits is the end mark, as is the last one of the whole text.
            self._warn_of_cut(warn, source, limit, whole.shape[1], whole[0, limit - 1 : -1])
        given = (tokens.input_ids, tokens.attention_mask) if self._encoding.masked else (tokens.input_ids,)
        return self._encoding.output(self._encoder(*given), tokens.attention_mask)

    def _encode_in_template(self, template: Template, source: PromptText, prompt: Prompt, warn: Warn) -> Tensor:
        """The same for text in a template, which is cut together with it."""
        whole = self._tokenizer(template.before + source.text + template.after, return_tensors="pt").input_ids
        limit = self._encoding.max_length(prompt) or self._tokenizer.model_max_length
        after = len(self._tokenizer(template.after).input_ids)
        text = whole[0, template.skipped : whole.shape[1] - after]
        if len(text) > limit:
            self._warn_of_cut(warn, source, limit, len(text), text[limit:])
        tokens = whole[:, : template.skipped + limit].to(self._device)
        return self._encoding.output(self._encoder(tokens), torch.ones_like(tokens))

    def _warn_of_cut(self, warn: Warn, source: PromptText, limit: int, length: int, removed: Tensor) -> None:
        warn(
            source.field,
            f"{self._encoding.encoder} reads at most {limit} tokens, and the text has {length}; "
            f"it was cut before: {shorten(self._tokenizer.decode(removed))}",
        )


def shorten(text: str) -> str:
    """The text, or its beginning: a warning is kept and sent with every answer."""
    return text if len(text) <= MOST_TOLD else f"{text[:MOST_TOLD]} ..."
