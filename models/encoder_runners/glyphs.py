"""Encodes the quoted texts of a prompt, which GLM-Image renders as glyphs."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from models.encoder_runners.callbacks import Warn
from models.encoder_runners.checks import check_tokenizer
from models.encoder_runners.text import shorten

QUOTES = (("'", "'"), ("\u201c", "\u201d"), ('"', '"'), ("\u300c", "\u300d"))
"""Pairs of opening and closing quotation marks, in encoding order."""

_PATTERNS = tuple(re.compile(f"{start}([^{start}{end}]*){end}") for start, end in QUOTES)


def quoted_texts(prompt: str) -> list[str]:
    """Return the quoted texts of a prompt, ordered by kind of quotation mark, then by position.

    Apostrophes also count as quotation marks: an apostrophe is paired with the next apostrophe.
    """
    return [text for pattern in _PATTERNS for text in pattern.findall(prompt)]


class GlyphEncoder:
    """A byte-level tokenizer and its encoder. Raises CheckpointError if they are incompatible."""

    def __init__(self, tokenizer: Any, encoder: Any, device: torch.device) -> None:
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._device = device
        check_tokenizer("tokenizer", tokenizer, "text_encoder", encoder.config.vocab_size)

    def encode(self, prompt: str, max_length: int, warn: Warn) -> Tensor:
        """Concatenated hidden states (1, tokens, size) of all quoted texts, or of an empty text.

        Each text is truncated to `max_length` tokens, which warn(field, message) reports.
        """
        texts = quoted_texts(prompt) or [""]
        rows = [self._tokenizer(text, max_length=max_length, truncation=True).input_ids for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row) < (length := len(self._tokenizer(text, verbose=False).input_ids)):
                message = f"a quoted text of {length} tokens is truncated to {max_length}, the limit of text_encoder"
                warn("prompt", f"{message}: {shorten(text)}")
        # If the number of texts is even, each text gets a leading padding token, as in Diffusers.
        lead = [self._tokenizer.pad_token_id] if len(rows) % 2 == 0 else []
        sequences = [torch.tensor(lead + row) for row in rows]
        tokens = torch.nn.utils.rnn.pad_sequence(sequences, True, self._tokenizer.pad_token_id)
        lengths = torch.tensor([len(each) for each in sequences])
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(self._device)
        hidden: Tensor = self._encoder(tokens.to(self._device), attention_mask=mask.long()).last_hidden_state
        return hidden[mask][None]
