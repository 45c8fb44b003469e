"""Loaders of language models as encoders: only hidden states are used, never next-token logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.loader import load_pretrained

if TYPE_CHECKING:
    import torch

    from common.checkpoint import Checkpoint


def load_language_model(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a language model that returns the hidden states of all layers. Raises CheckpointError."""
    return _as_encoder(load_pretrained(checkpoint, name, device, dtype))


def load_causal_language_model(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a causal language model without its language modeling head. Raises CheckpointError."""
    return _as_encoder(load_pretrained(checkpoint, name, device, dtype).model)


def load_multimodal_language_model(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the language model of a vision-language model, without its vision tower. Raises CheckpointError."""
    return _as_encoder(load_pretrained(checkpoint, name, device, dtype).model.language_model)


def _as_encoder(model: Any) -> Any:
    model.config.use_cache = False
    model.config.output_hidden_states = True
    return model
