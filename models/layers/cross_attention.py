"""Cross-attention to a context that is constant during a request.

Parameter names are those of Diffusers' checkpoints. Shapes: B batch, S tokens, T tokens of the context, D hidden size.
"""

# ruff: noqa: N803  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.kernels.attention import attention
from models.kernels.qk_norm_rotate import split_heads
from models.layers.linear import Linear
from models.layers.norms import RMSNorm
from models.layers.qk_norm import QKNormModules, apply_qk_norm


class CrossAttention(nn.Module):
    """Cross-attention to a context such as a text, whose keys and values are computed once per request.

    The norms of queries and keys are over all heads together. Tokens and context have the same hidden size.
    """

    def __init__(self, size: int, head_size: int, eps: float) -> None:
        super().__init__()
        self.head_size = head_size
        self.to_q = Linear(size, size)
        self.to_k = Linear(size, size)
        self.to_v = Linear(size, size)
        self.to_out = nn.ModuleList([Linear(size, size)])
        self.norm_q = RMSNorm(size, eps)
        self.norm_k = RMSNorm(size, eps)

    def keys_and_values(self, context_BTD: Tensor) -> Tensor:
        """Keys, then values, of a context (B, T, D): (B, T, 2 * D)."""
        return self.project_keys_and_values(context_BTD, self.to_k, self.to_v, self.norm_k)

    def forward(self, x_BSD: Tensor, kv: Tensor) -> Tensor:
        """The attention output (B, S, D), before the output projection."""
        return self.attend(self.queries(x_BSD), kv)

    def queries(self, x_BSD: Tensor) -> Tensor:
        """Normalized queries (B, S, heads, head size)."""
        q = self.to_q(x_BSD)
        apply_qk_norm(q, QKNormModules((self.norm_q,), self.head_size))
        return split_heads(q, self.head_size)

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """Attention (B, S, D) of queries to keys and values (B, T, 2 * D)."""
        k, v = (split_heads(part, self.head_size) for part in kv.chunk(2, dim=-1))
        return attention(q, k, v).flatten(2)

    def project_keys_and_values(self, x: Tensor, to_k: Linear, to_v: Linear, norm: RMSNorm) -> Tensor:
        """Keys, then values, of a context of any hidden size, by the given projections."""
        k: Tensor = to_k(x)
        apply_qk_norm(k, QKNormModules((norm,), self.head_size))
        return torch.cat((k, to_v(x)), dim=-1)
