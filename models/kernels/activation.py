"""Activation kernels, for GEMM backends without an epilogue for the activation."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import gelu, silu

from models.kernels.backends import Operation

_GELU: Operation[Callable[[Tensor, Tensor], None]] = Operation("gelu")
_SILU_GATE: Operation[Callable[[Tensor], Tensor]] = Operation("silu gate")


def write_gelu(x: Tensor, out: Tensor) -> None:
    """Write GELU (tanh approximation) of x (B, S, F) to `out`, which may be columns of a wider tensor."""
    _GELU.for_device_of(x)(x, out)


def gate_by_silu(x: Tensor) -> Tensor:
    """SwiGLU: SiLU of the first half of the channels times the second half; x (B, S, 2F) to (B, S, F)."""
    return _SILU_GATE.for_device_of(x)(x)


@_GELU.register("torch")
def _write_gelu(x: Tensor, out: Tensor) -> None:
    out.copy_(gelu(x, approximate="tanh"))


@_GELU.register("triton")
def _write_gelu_by_triton(x: Tensor, out: Tensor) -> None:
    # An optional package for GPUs.
    from models.kernels import triton_kernels

    triton_kernels.write_gelu(x, out)


@_SILU_GATE.register("torch")
def _gate_by_silu(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return silu(first) * second


@_SILU_GATE.register("triton")
def _gate_by_silu_by_triton(x: Tensor) -> Tensor:
    # An optional package for GPUs.
    from models.kernels import triton_kernels

    return triton_kernels.gate_by_silu(x)
