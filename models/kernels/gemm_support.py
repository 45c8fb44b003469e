"""Requirements that GEMM backends share: layout of the matrices, and heads that the epilogues support."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 16
"""Alignment of a matrix and of its rows, in bytes."""

MIN_ROWS = 1024
"""Smallest number of rows of x for which backends other than PyTorch are faster."""

HEAD_SIZE = 128
"""Head size of the epilogue that normalizes heads."""

HEAD_EPS = 1e-6
"""Epsilon of the norm in the epilogue that normalizes heads."""


def can_load(*matrices: Tensor) -> bool:
    """Whether backends other than PyTorch support the matrices: bfloat16 on a GPU, aligned, row-major."""
    if not all(matrix.is_cuda and matrix.dtype == torch.bfloat16 for matrix in matrices):
        return False
    # torch.compile cannot trace these backends.
    return not torch.compiler.is_compiling() and all(map(_is_aligned, matrices))


def _is_aligned(matrix: Tensor) -> bool:
    width = matrix.dtype.itemsize
    return matrix.stride(1) == 1 and matrix.stride(0) * width % ALIGNMENT == 0 and matrix.data_ptr() % ALIGNMENT == 0
