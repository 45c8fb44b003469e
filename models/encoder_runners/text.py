"""Runs a text encoder as configured by a TextEncoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.artifacts import Prompt
from common.errors import CheckpointError
from configs.models.encodings import PromptText, Template, TextEncoding
from models.encoder_runners.callbacks import Warn
from models.encoder_runners.checks import check_tokenizer

MAX_WARNING_CHARS = 2000
"""Longest quotation of a prompt in a warning, in characters."""


class TextEncoder:
    """A tokenizer and an encoder of transformers, with an optional connector module.

    Raises CheckpointError if tokenizer and encoder are incompatible.
    """

    def __init__(self, encoding: TextEncoding, modules: Mapping[str, Any], device: torch.device) -> None:
        self._encoding = encoding
        self._tokenizer = modules[encoding.tokenizer]
        self._encoder = modules[encoding.encoder]
        self._connector = None if encoding.connector is None else modules[encoding.connector.module]
        self._device = device
        self._check()

    def _check(self) -> None:
        names, config = self._encoding, self._encoder.config.to_dict()
        check_tokenizer(names.tokenizer, self._tokenizer, names.encoder, config["vocab_size"])
        longest = names.max_length(Prompt(prompt="")) or self._tokenizer.model_max_length
        positions = config.get("max_position_embeddings")
        if names.template is None and positions is not None and longest > positions:
            raise CheckpointError(
                f"{names.tokenizer}: a length of {longest} tokens is not at most {positions}, the positions of "
                f"{names.encoder}; both modules must belong to one model"
            )

    def encode(self, prompt: Prompt, warn: Warn) -> Mapping[str, Tensor]:
        """Encode a prompt to keyword arguments of the denoiser, with batch size 1.

        A text that is too long is truncated; warn(field, message) reports the removed text.
        """
        output, mask = self._encode(prompt, warn)
        if self._encoding.connector is None:
            return {self._encoding.keyword: output}
        return self._encoding.connector.connect(self._connector, output, mask)

    def _encode(self, prompt: Prompt, warn: Warn) -> tuple[Tensor, Tensor]:
        """The encoding's output and the attention mask, int64 (1, tokens)."""
        source = self._encoding.text(prompt)
        if self._encoding.template is not None:
            return self._encode_in_template(self._encoding.template, source, prompt, warn)
        limit = self._encoding.max_length(prompt) or self._tokenizer.model_max_length
        adds_special_tokens = not self._encoding.has_special_tokens
        tokens = self._tokenizer(
            source.text,
            padding="max_length",
            max_length=limit,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
            padding_side=self._encoding.padding_side,
            add_special_tokens=adds_special_tokens,
        ).to(self._device)
        whole = self._tokenizer(
            source.text, return_tensors="pt", verbose=False, add_special_tokens=adds_special_tokens
        ).input_ids
        if whole.shape[1] > limit:
            # If the tokenizer adds an end-of-sequence token, truncation retains that token as the last token.
            has_end = adds_special_tokens and whole[0, -1] in self._tokenizer.all_special_ids
            removed = whole[0, limit - 1 : -1] if has_end else whole[0, limit:]
            self._warn_of_truncation(warn, source, limit, whole.shape[1], removed)
        given = (tokens.input_ids, tokens.attention_mask) if self._encoding.masked else (tokens.input_ids,)
        return self._encoding.output(self._encoder(*given), tokens.attention_mask), tokens.attention_mask

    def _encode_in_template(
        self, template: Template, source: PromptText, prompt: Prompt, warn: Warn
    ) -> tuple[Tensor, Tensor]:
        """Encode a text within its template. Returns output and mask as _encode() does."""
        whole = self._tokenizer(template.before + source.text + template.after, return_tensors="pt").input_ids
        limit = self._encoding.max_length(prompt) or self._tokenizer.model_max_length
        after = len(self._tokenizer(template.after, add_special_tokens=False).input_ids)
        text = whole[0, template.skipped : whole.shape[1] - after]
        if len(text) > limit:
            self._warn_of_truncation(warn, source, limit, len(text), text[limit:])
        tokens = whole[:, : template.skipped + limit].to(self._device)
        mask = torch.ones_like(tokens)
        return self._encoding.output(self._encoder(tokens), mask), mask

    def _warn_of_truncation(self, warn: Warn, source: PromptText, limit: int, length: int, removed: Tensor) -> None:
        warn(
            source.field,
            f"{length} tokens are truncated to {limit}, the limit of {self._encoding.encoder}; "
            f"removed: {shorten(self._tokenizer.decode(removed))}",
        )


def shorten(text: str) -> str:
    """Truncate a text to MAX_WARNING_CHARS: warnings are stored and sent with every reply."""
    return text if len(text) <= MAX_WARNING_CHARS else f"{text[:MAX_WARNING_CHARS]} ..."
