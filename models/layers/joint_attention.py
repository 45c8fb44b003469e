"""Attention in DiTs with a text and an image stream. Parameter names are those of Diffusers' checkpoints.

Shapes: B batch, T text tokens, I image tokens, S = T + I (text first), D hidden size, H heads, K head size.
"""

# ruff: noqa: N803, N806  (the capitals of a tensor's name are its shape)

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention import Attention
from models.layers.norms import RMSNorm, apply_qk_norm
from models.layers.rotary import Rotation, apply_rotary


class StreamAttention(nn.Module):
    """Attention over one stream, with normalised queries and keys. The block projects the result."""

    def __init__(self, size: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.to_q = nn.Linear(size, size)
        self.to_k = nn.Linear(size, size)
        self.to_v = nn.Linear(size, size)
        self.norm_q = RMSNorm(head_size)
        self.norm_k = RMSNorm(head_size)
        self.attention = Attention()

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, tokens, D) to queries, keys and values (B, tokens, H, K)."""
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_size)) for layer in (self.to_q, self.to_k, self.to_v))
        return *apply_qk_norm(q, k, self.norm_q, self.norm_k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
        """Turn queries and keys, attend, and join the heads: (B, S, D)."""
        attended: Tensor = self.attention(apply_rotary(q, rotation), apply_rotary(k, rotation), v)
        return attended.flatten(2)

    def forward(self, x_BSD: Tensor, rotation: Rotation) -> Tensor:
        """Self-attention."""
        return self.attend(*self.qkv(x_BSD), rotation)


class JointAttention(StreamAttention):
    """Attention over both streams at once, each with projections of its own."""

    def __init__(self, size: int, head_size: int) -> None:
        super().__init__(size, head_size)
        self.add_q_proj = nn.Linear(size, size)
        self.add_k_proj = nn.Linear(size, size)
        self.add_v_proj = nn.Linear(size, size)
        self.norm_added_q = RMSNorm(head_size)
        self.norm_added_k = RMSNorm(head_size)
        self.to_out = nn.ModuleList([nn.Linear(size, size)])
        self.to_add_out = nn.Linear(size, size)

    def added_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv of the text stream."""
        layers = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_size)) for layer in layers)
        return *apply_qk_norm(q, k, self.norm_added_q, self.norm_added_k), v

    def joint(self, image_BID: Tensor, text_BTD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """What the image and the text stream each took from both."""
        pairs = zip(self.added_qkv(text_BTD), self.qkv(image_BID), strict=True)
        q, k, v = (torch.cat(pair, dim=1) for pair in pairs)
        joint_BSD = self.attend(q, k, v, rotation)
        tokens = text_BTD.shape[1]
        return self.to_out[0](joint_BSD[:, tokens:]), self.to_add_out(joint_BSD[:, :tokens])
