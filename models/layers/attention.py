"""The one entry point for attention; what runs behind it is chosen here."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention without causality. q, k, v and the result are (batch, tokens, heads, head size).

    `mask` broadcasts to (batch, heads, query tokens, key tokens): True attends, or a float that is added to the scores.
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
