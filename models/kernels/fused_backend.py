"""Chooses between the fused kernels of a device and plain PyTorch, which defines what they compute."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from models.kernels.packages import is_usable

ALIGNMENT = 16
"""Bytes, of the rows of matrices and of where these begin, as products' kernels load them."""


def can_load(*matrices: Tensor) -> bool:
    """Whether products' own kernels take these: bfloat16 on a GPU, columns adjacent and rows aligned."""
    if not all(matrix.is_cuda and matrix.dtype == torch.bfloat16 for matrix in matrices):
        return False
    # A compiler could not trace them.
    return not torch.compiler.is_compiling() and all(map(_is_aligned, matrices))


def _is_aligned(matrix: Tensor) -> bool:
    width = matrix.dtype.itemsize
    return matrix.stride(1) == 1 and matrix.stride(0) * width % ALIGNMENT == 0 and matrix.data_ptr() % ALIGNMENT == 0


def kernels_for(x: Tensor) -> ModuleType | None:
    """models.kernels.triton_kernels for tensors on CUDA; None where Triton is absent or broken, and on other devices.

    PyTorch's own operators then compute the same.
    """
    if not x.is_cuda or not is_usable("triton"):
        return None
    # An optional package for GPUs.
    from models.kernels import triton_kernels

    return triton_kernels
