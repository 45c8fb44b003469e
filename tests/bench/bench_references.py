"""Diffusers' models behind forward() methods that take tensors, with given images apart, for benches."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel, ZImageTransformer2DModel
from torch import Tensor


class StackedZImage(ZImageTransformer2DModel):  # type: ignore[misc]
    """Diffusers' model, which takes a list of images and one of texts, on tensors."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Predictions (B, C, rows, columns)."""
        del return_dict
        images = list(hidden_states[:, :, None])
        (made,) = super().forward(images, timestep, list(encoder_hidden_states), return_dict=False)
        return (torch.stack(made)[:, :, 0],)


class ConditionedQwenImage(QwenImageTransformer2DModel):  # type: ignore[misc]
    """Diffusers' model with the tokens of given images as an argument of their own."""

    def forward(self, hidden_states: Tensor, condition_states: Tensor, **inputs: Any) -> tuple[Tensor]:
        """Velocity (B, I, C) of hidden_states (B, I, C); condition_states are (B, tokens, C)."""
        tokens = torch.cat((hidden_states, condition_states), dim=1)
        (velocity,) = super().forward(tokens, **inputs)
        return (velocity[:, : hidden_states.shape[1]],)
