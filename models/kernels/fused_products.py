"""Matrix products on Hopper whose epilogue does what would else be a pass of its own over the result.

The kernels are composed with QuACK (github.com/Dao-AILab/quack), an optional package. Elsewhere, and for other sizes,
layers do the same in several passes. An epilogue computes in float32 and rounds once, where passes round between.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from models.kernels.fused_backend import can_load
from models.kernels.packages import is_usable

HEAD_SIZE = 128
"""Of the heads that normed_heads_into() is for."""

EPS = 1e-6
"""Of their norms."""

LEAST_ROWS = 1024
"""Below, cuBLAS' kernels with a pass of their own behind them take as long or less."""

HOPPER = (9, 0)


def has_heads(head_size: int, norm_size: int, eps: float) -> bool:
    """Whether normed_heads_into() is for such heads and norms of them."""
    return head_size == norm_size == HEAD_SIZE and eps == EPS


def can_fuse(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Whether products of x (M, K) and weight (N, K) into out (M, N) can be fused: many rows, aligned, in bfloat16."""
    if not (can_load(x, weight, out) and len(x) >= LEAST_ROWS and is_usable("quack-kernels")):
        return False
    return _capability(x.device.index) == HOPPER


def can_add(x: Tensor, weight: Tensor, onto: Tensor) -> bool:
    """Whether add_gated() is for these: with more inputs, other kernels are faster by more than a pass takes."""
    return weight.shape[1] <= len(weight) and can_fuse(x, weight, onto)


def gelu_into(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """out = gelu(x @ weight.T + bias) in GELU's tanh form, of the hardware's tanh (off by 2^-11 at most)."""
    _kernels().gelu_into(x, weight, bias, out)


def add_gated(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, onto: Tensor) -> None:
    """onto += gate * (x @ weight.T + bias), with gate (N,) in bfloat16 or float32."""
    _kernels().add_gated(x, weight, bias, gate, onto)


def normed_heads_into(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, turns: Tensor, out: Tensor) -> None:
    """out = x @ weight.T + bias, each head of HEAD_SIZE divided by its root mean square, scaled by `scale`, and turned.

    scale is (N,), turns float32 (M, HEAD_SIZE): cos and sin of each pair of a head's channels, side by side.
    """
    _kernels().normed_heads_into(x, weight, bias, scale, turns, out)


@lru_cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _kernels() -> ModuleType:
    # An optional package for GPUs, which takes seconds to import.
    from models.kernels import quack_kernels

    return quack_kernels
