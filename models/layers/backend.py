"""Chooses between the fused kernels of a device and plain PyTorch, which defines what they compute."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from types import ModuleType

from torch import Tensor

ALIGNMENT = 16
"""Bytes, of the rows of matrices and of where these begin, as products' kernels load them."""


@lru_cache
def is_installed(package: str) -> bool:
    """Whether an optional package for GPUs is there to import."""
    return importlib.util.find_spec(package) is not None


def is_aligned(matrix: Tensor) -> bool:
    """Whether products' kernels can load it, or write to it: its columns are adjacent, its rows aligned."""
    width = matrix.dtype.itemsize
    return matrix.stride(1) == 1 and matrix.stride(0) * width % ALIGNMENT == 0 and matrix.data_ptr() % ALIGNMENT == 0


def kernels_for(x: Tensor) -> ModuleType | None:
    """models.layers.triton_kernels for tensors on CUDA; None elsewhere, where PyTorch's own operators do the same."""
    if not x.is_cuda:
        return None
    # Triton is there only where torch has CUDA.
    from models.layers import triton_kernels

    return triton_kernels
