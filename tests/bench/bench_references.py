"""Diffusers' models with other arguments of forward(): batched tensors, and tokens of input images."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel, ZImageTransformer2DModel
from torch import Tensor


class StackedZImage(ZImageTransformer2DModel):  # type: ignore[misc]
    """Diffusers' Z-Image transformer on batched tensors instead of lists of images and texts."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Predict (B, C, rows, columns)."""
        del return_dict
        images = list(hidden_states[:, :, None])
        (made,) = super().forward(images, timestep, list(encoder_hidden_states), return_dict=False)
        return (torch.stack(made)[:, :, 0],)


class ConditionedQwenImage(QwenImageTransformer2DModel):  # type: ignore[misc]
    """Diffusers' Qwen-Image transformer with the tokens of input images as a separate argument."""

    def forward(self, hidden_states: Tensor, condition_states: Tensor, **inputs: Any) -> tuple[Tensor]:
        """Velocity (B, I, C) of hidden_states (B, I, C); condition_states are (B, tokens, C)."""
        tokens = torch.cat((hidden_states, condition_states), dim=1)
        (velocity,) = super().forward(tokens, **inputs)
        return (velocity[:, : hidden_states.shape[1]],)
