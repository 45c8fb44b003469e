"""Language models as encoders: the states of its layers are used, and never its predictions of the next token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.loader import load_pretrained

if TYPE_CHECKING:
    import torch

    from common.checkpoint import Checkpoint


def load_language_model(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A language model, which returns the states of all layers. Raises CheckpointError."""
    return _as_encoder(load_pretrained(checkpoint, name, device, dtype))


def load_causal_language_model(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The same, from a model with a head for the next token. Raises CheckpointError."""
    return _as_encoder(load_pretrained(checkpoint, name, device, dtype).model)


def load_multimodal_language_model(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The same, from a language model with a vision tower, which is left out. Raises CheckpointError."""
    return _as_encoder(load_pretrained(checkpoint, name, device, dtype).model.language_model)


def _as_encoder(model: Any) -> Any:
    model.config.use_cache = False
    model.config.output_hidden_states = True
    return model
