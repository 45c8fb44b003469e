"""The one entry point for attention; what runs behind it is chosen here."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

_ATEN = torch.ops.aten
HOPPER = (9, 0)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention without causality. q, k, v and the result are (batch, tokens, heads, head size).

    `mask` broadcasts to (batch, heads, query tokens, key tokens): True attends, or a float that is added to the scores.
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """attention() over some of the keys, and what it takes to merge it with that over others.

    The second result is the logarithm of the sum of the exponentials of each query's scores, float32 (batch, tokens,
    heads). There must be at least one query and one key.
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if q.device.type == "cpu":
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype == torch.float32:
        out, lse = _ATEN._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    elif torch.cuda.get_device_capability(q.device) >= HOPPER:
        out, lse = _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    else:
        out, lse = _ATEN._scaled_dot_product_flash_attention(q, k, v)[:2]
    # Some kernels give a last dimension of 1, or more rows than there are queries.
    lse = lse.reshape(*lse.shape[:2], -1)[:, :, : q.shape[2]]
    return out.transpose(1, 2), lse.transpose(1, 2)


class Attention(nn.Module):
    """attention() as a module, so that a parallel form can take its place. It has no parameters."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, tokens, heads, head size) each."""
        return attention(q, k, v)
