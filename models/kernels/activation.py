"""Activations that write their result where it is needed."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu, silu

from models.kernels.fused_backend import kernels_for


def write_gelu(x: Tensor, out: Tensor) -> None:
    """out = GELU (tanh form) of x, (B, S, F) each; `out` may be columns of a wider tensor."""
    if (kernels := kernels_for(x)) is not None:
        kernels.write_gelu(x, out)
    else:
        out.copy_(gelu(x, approximate="tanh"))


def gate_by_silu(x: Tensor) -> Tensor:
    """SiLU of the first half of the channels times the second half: x (B, S, 2F) to (B, S, F)."""
    if (kernels := kernels_for(x)) is not None:
        gated: Tensor = kernels.gate_by_silu(x)
        return gated
    first, second = x.chunk(2, dim=-1)
    return silu(first) * second
