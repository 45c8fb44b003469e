"""Loaders of Qwen2.5-VL as an encoder: only hidden states are used, never next-token logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.loader import load_pretrained

if TYPE_CHECKING:
    import torch

    from common.checkpoint import Checkpoint


def load_qwen_vl_model(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the language model and the vision tower, for prompts with images. Raises CheckpointError."""
    model = load_pretrained(checkpoint, name, device, dtype).model
    model.language_model.config.use_cache = False
    return model


def load_qwen_text_model(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Load only the language model, for prompts without images. Raises CheckpointError."""
    model = load_pretrained(checkpoint, name, device, dtype).model.language_model
    model.config.use_cache = False
    return model
