"""Chooses between the fused kernels of a device and plain PyTorch, which defines what they compute."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor


def kernels_for(x: Tensor) -> ModuleType | None:
    """models.layers.triton_kernels for tensors on CUDA; None elsewhere, where PyTorch's own operators do the same."""
    if not x.is_cuda:
        return None
    # Triton is there only where torch has CUDA.
    from models.layers import triton_kernels

    return triton_kernels
