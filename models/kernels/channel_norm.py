"""Norm over the channels of each pixel, then SiLU; used between convolutions of a video decoder."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import normalize, silu

from models.kernels.backends import Operation

_OPERATION: Operation[Callable[[Tensor, Tensor, float], Tensor]] = Operation("channel norm and silu")


def channel_norm_silu(frame: Tensor, weight: Tensor, root: float) -> Tensor:
    """Compute SiLU(x / |x| * root * weight) for the channels x of each pixel of a frame (1, C, H, W).

    The denominator |x| is the L2 norm; weight is (C,). With `root` = sqrt(C) this is an RMS norm.
    """
    return _OPERATION.for_device_of(frame)(frame, weight, root)


@_OPERATION.register("torch")
def _by_torch(frame: Tensor, weight: Tensor, root: float) -> Tensor:
    normed = normalize(frame.float(), dim=1).to(frame.dtype)
    return silu(normed * root * weight.view(-1, 1, 1), inplace=True)


@_OPERATION.register("triton")
def _by_triton(frame: Tensor, weight: Tensor, root: float) -> Tensor:
    # An optional package for GPUs.
    from models.kernels import triton_kernels

    return triton_kernels.channel_norm_silu(frame, weight, root)
