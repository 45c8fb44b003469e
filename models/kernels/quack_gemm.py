"""GEMM with fused epilogues on Hopper, by QuACK, an optional package.

On other GPUs, and for shapes that these epilogues do not support, GELU may be an epilogue of cuBLASLt or PyTorch; all
other operations are separate kernels after the GEMM. An epilogue computes in float32 and rounds once; separate kernels
round in between.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from models.kernels.gemm_support import MIN_ROWS, can_load
from models.kernels.packages import is_usable

_HOPPER = (9, 0)


def can_fuse(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Whether x (M, K) @ weight (N, K).T can have an epilogue: aligned bfloat16, M >= MIN_ROWS, Hopper."""
    if not (can_load(x, weight, out) and len(x) >= MIN_ROWS and is_usable("quack-kernels")):
        return False
    return _capability(x.device.index) == _HOPPER


def can_add(x: Tensor, weight: Tensor, onto: Tensor) -> bool:
    """Whether add_gated() supports the matrices and pays off. For K > N, cuBLASLt and a separate kernel are faster."""
    return weight.shape[1] <= len(weight) and can_fuse(x, weight, onto)


def gelu_into(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """out = gelu(x @ weight.T + bias), tanh approximation, by the GPU's tanh (error at most 2^-11)."""
    _epilogues().gelu_into(x, weight, bias, out)


def add_gated(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, onto: Tensor) -> None:
    """onto += gate * (x @ weight.T + bias), with gate (N,) in bfloat16 or float32."""
    _epilogues().add_gated(x, weight, bias, gate, onto)


def normed_heads_into(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, angles: Tensor, out: Tensor) -> None:
    """out = x @ weight.T + bias, followed by RMS norm of each head of HEAD_SIZE channels, scale and RoPE.

    `scale` is (N,). `angles` are float32 (M, HEAD_SIZE): cos and sin of each pair of a head's channels, interleaved.
    """
    _epilogues().normed_heads_into(x, weight, bias, scale, angles, out)


@lru_cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _epilogues() -> ModuleType:
    # An optional package for GPUs, which takes seconds to import.
    from models.kernels import quack_epilogues

    return quack_epilogues
