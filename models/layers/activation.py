"""Activations that write their result where it is needed."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu

from models.layers.fused_backend import kernels_for


def write_gelu(x: Tensor, out: Tensor) -> None:
    """out = GELU (tanh form) of x, (B, S, F) each; `out` may be columns of a wider tensor."""
    if (kernels := kernels_for(x)) is not None:
        kernels.write_gelu(x, out)
    else:
        out.copy_(gelu(x, approximate="tanh"))
