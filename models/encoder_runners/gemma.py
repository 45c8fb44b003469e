"""Gemma 3 as an encoder: the states of all its layers are used, and never its predictions of the next token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.loader import load_pretrained

if TYPE_CHECKING:
    import torch

    from common.checkpoint import Checkpoint


def load_gemma_text_model(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The language model alone, which returns the states of all layers. Raises CheckpointError."""
    model = load_pretrained(checkpoint, name, device, dtype).model.language_model
    model.config.use_cache = False
    model.config.output_hidden_states = True
    return model
