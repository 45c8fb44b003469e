"""What GEMM backends have in common: the matrices that they can load, and the heads that their epilogues know."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes: alignment of a matrix and of its rows."""

MIN_ROWS = 1024
"""Rows of x from which on the backends beside PyTorch are faster."""

HEAD_SIZE = 128
"""Channels of the heads that an epilogue normalises."""

HEAD_EPS = 1e-6
"""Epsilon of their norms."""


def can_load(*matrices: Tensor) -> bool:
    """Whether backends beside PyTorch take the matrices: bfloat16 on a GPU, columns adjacent and rows aligned."""
    if not all(matrix.is_cuda and matrix.dtype == torch.bfloat16 for matrix in matrices):
        return False
    # A compiler could not trace these backends.
    return not torch.compiler.is_compiling() and all(map(_is_aligned, matrices))


def _is_aligned(matrix: Tensor) -> bool:
    width = matrix.dtype.itemsize
    return matrix.stride(1) == 1 and matrix.stride(0) * width % ALIGNMENT == 0 and matrix.data_ptr() % ALIGNMENT == 0
