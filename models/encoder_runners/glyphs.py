"""Encodes the texts that a prompt quotes, which are to be drawn as glyphs."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from models.encoder_runners.checks import check_tokenizer
from models.encoder_runners.text import Warn, shorten

QUOTES = (("'", "'"), ("\u201c", "\u201d"), ('"', '"'), ("\u300c", "\u300d"))
"""Opening and closing marks, in the order in which their texts are encoded."""

_PATTERNS = tuple(re.compile(f"{start}([^{start}{end}]*){end}") for start, end in QUOTES)


def quoted_texts(prompt: str) -> list[str]:
    """The quoted texts of a prompt: by kind of quotation mark, then in order. A lone apostrophe pairs with the next."""
    return [text for pattern in _PATTERNS for text in pattern.findall(prompt)]


class GlyphEncoder:
    """A tokenizer of bytes and its encoder. Raises CheckpointError when the two do not fit."""

    def __init__(self, tokenizer: Any, encoder: Any, device: torch.device) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._device = device
        check_tokenizer("tokenizer", tokenizer, "text_encoder", encoder.config.vocab_size)

    def encode(self, prompt: str, max_length: int, warn: Warn) -> Tensor:
        """The states of all quoted texts' tokens, (1, tokens, size); those of an empty text where none is quoted.

        Each text is cut to `max_length` tokens; warn(field, message) reports it.
        """
        texts = quoted_texts(prompt) or [""]
        rows = [self._tokenizer(text, max_length=max_length, truncation=True).input_ids for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row) < (length := len(self._tokenizer(text, verbose=False).input_ids)):
                message = f"text_encoder reads at most {max_length} tokens of a quoted text, and one has {length}"
                warn("prompt", f"{message}: {shorten(text)}")
        # As in training: an even number of texts, and one token before each.
        lead = [self._tokenizer.pad_token_id] if len(rows) % 2 == 0 else []
        sequences = [torch.tensor(lead + row) for row in rows]
        tokens = torch.nn.utils.rnn.pad_sequence(sequences, True, self._tokenizer.pad_token_id)
        lengths = torch.tensor([len(each) for each in sequences])
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(self._device)
        hidden: Tensor = self._encoder(tokens.to(self._device), attention_mask=mask.long()).last_hidden_state
        return hidden[mask][None]
