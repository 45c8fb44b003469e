"""Matrix products on Hopper whose epilogue does what would else be a pass of its own over the result.

The kernels are composed with QuACK (github.com/Dao-AILab/quack), an optional package. Elsewhere, and for other sizes,
layers do the same in several passes. An epilogue computes in float32 and rounds once, where passes round between.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil
from types import ModuleType

import torch
from torch import Tensor

from models.layers.backend import is_installed

HEAD_SIZE = 128
"""Of the heads that normed_heads_into() is for."""

EPS = 1e-6
"""Of their norms."""

LEAST_ROWS = 1024
"""Below, what an epilogue saves is less than what its kernel's tiles leave idle."""

MOST_FEW_ROWS = 256
"""Rows of two tiles, which run as a pair that reads each weight once."""

PIECE = 3072
"""Inputs that are worth a tile of their own, where one tile's inputs are cut into pieces."""

TILE = (128, 192)
"""Rows and columns."""

HOPPER = (9, 0)

_ALIGNMENT = 16
"""Bytes, of rows and of where they begin."""


def has_fused_products() -> bool:
    """Whether their package is installed. It is part of the numerics fingerprint."""
    return is_installed("quack")


def has_heads(head_size: int, norm_size: int, eps: float) -> bool:
    """Whether normed_heads_into() is for such heads and norms of them."""
    return head_size == norm_size == HEAD_SIZE and eps == EPS


def can_gelu(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Whether gelu_into() is for x (M, K), weight (N, K) and out (M, N): where tiles fill the GPU."""
    return _takes(x, weight, out) and _filled(x, weight) >= 0.9


def can_normalise(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Whether normed_heads_into() is for these."""
    return _takes(x, weight, out) and len(x) >= LEAST_ROWS


def can_add(x: Tensor, weight: Tensor, onto: Tensor) -> bool:
    """Whether add_gated() is for these: with more inputs, other kernels are faster by more than a pass takes."""
    return _takes(x, weight, onto) and len(x) >= LEAST_ROWS and weight.shape[1] <= len(weight)


def pieces_of(x: Tensor, weight: Tensor, out: Tensor) -> int | None:
    """In how many pieces few_rows_into() would best take the inputs of these; None where it is not for them."""
    if len(x) > MOST_FEW_ROWS or not _takes(x, weight, out):
        return None
    tiles = _tiles(x, weight)
    pieces = max(1, min(_multiprocessors(x.device.index) // tiles, weight.shape[1] // PIECE))
    return pieces if _filled(x, weight, pieces) >= 0.7 else None


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


def few_rows_into(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, pieces: int) -> None:
    """out = x @ weight.T + bias for few rows, as fast as the weight is read; `pieces` are summed in their order."""
    _kernels().few_rows_into(x, weight, bias, out, pieces)


def _takes(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    if not (x.is_cuda and x.dtype == weight.dtype == out.dtype == torch.bfloat16 and has_fused_products()):
        return False
    # A compiler could not trace them.
    if torch.compiler.is_compiling() or not len(x) or _capability(x.device.index) != HOPPER:
        return False
    return all(_is_aligned(each) for each in (x, weight, out))


def _tiles(x: Tensor, weight: Tensor) -> int:
    return ceil(len(x) / TILE[0]) * ceil(len(weight) / TILE[1])


def _filled(x: Tensor, weight: Tensor, pieces: int = 1) -> float:
    """The share of the multiprocessors' turns that tiles take."""
    turns = _tiles(x, weight) * pieces / _multiprocessors(x.device.index)
    return turns / ceil(turns)


@lru_cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache
def _multiprocessors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _is_aligned(matrix: Tensor) -> bool:
    width = matrix.dtype.itemsize
    return matrix.stride(1) == 1 and matrix.stride(0) * width % _ALIGNMENT == 0 and matrix.data_ptr() % _ALIGNMENT == 0


def _kernels() -> ModuleType:
    # An optional package for GPUs, which takes seconds to import.
    from models.layers import quack_kernels

    return quack_kernels
