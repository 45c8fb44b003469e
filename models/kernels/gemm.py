"""GEMM with an epilogue, by the backend that supports the operands.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from models.kernels import cublas_lt, quack_gemm
from models.kernels.activation import write_gelu
from models.kernels.backends import Operation
from models.kernels.float8 import float8_linear, write_float8_linear
from models.kernels.gemm_support import HEAD_EPS, HEAD_SIZE


class Weight(NamedTuple):
    """Weight of a linear layer: values (N, K), and float32 scales (N,) of the rows of float8 values."""

    values: Tensor
    scale: Tensor | None = None


Epilogue = Literal["bias", "gelu", "gated addition", "norm and rotation"]

_BIAS: Operation[Callable[[Tensor, Weight, Tensor, Tensor], None]] = Operation("gemm")
_GELU: Operation[Callable[[Tensor, Weight, Tensor, Tensor], None]] = Operation("gemm with gelu")
_GATED_ADDITION: Operation[Callable[[Tensor, Weight, Tensor, Tensor, Tensor], None]] = Operation(
    "gemm with gated addition"
)
_NORM_ROTATION: Operation[Callable[[Tensor, Weight, Tensor, Tensor, Tensor, Tensor], None]] = Operation(
    "gemm with norm and rotation"
)


def choose_gemm(epilogue: Epilogue, x: Tensor, weight: Weight, out: Tensor | None) -> str | None:
    """Choose the backend of out (M, N) = x (M, K) @ weight (N, K).T with an epilogue.

    Returns None if no backend supports the gated addition, or the norm and rotation: the caller must run the epilogue
    separately. `out` may be None only for the epilogue "bias": the GEMM then returns a new tensor.
    """
    if epilogue != "bias" and weight.scale is None and out is not None:
        can_fuse = quack_gemm.can_add if epilogue == "gated addition" else quack_gemm.can_fuse
        if can_fuse(x, weight.values, out):
            return "quack"
    if epilogue in ("gated addition", "norm and rotation"):
        return None
    if weight.scale is not None:
        return "float8"
    if cublas_lt.can_multiply(x, weight.values, out):
        return "cublas_lt"
    # PyTorch's epilogue cannot write to columns of a wider tensor.
    return "torch_epilogue" if epilogue == "gelu" and x.is_cuda and out is not None and out.is_contiguous() else "torch"


def multiply(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, (..., K) to (..., N)."""
    if weight.scale is not None:
        return float8_linear(x, weight.values, weight.scale, bias)
    # cuBLASLt needs a bias. If x is not contiguous, flatten() would copy it.
    if bias is None or not x.is_contiguous() or choose_gemm("bias", rows := x.flatten(0, -2), weight, None) == "torch":
        return linear(x, weight.values, bias)
    result = x.new_empty(len(rows), len(weight.values))
    _BIAS["cublas_lt"](rows, weight, bias, result)
    return result.view(*x.shape[:-1], -1)


def multiply_into(x: Tensor, weight: Weight, bias: Tensor, out: Tensor) -> None:
    """out = x @ weight.T + bias; x and out are (B, tokens, features) and may be columns of wider tensors."""
    for x_MK, out_MN in _matrices(x, out):  # noqa: N806
        backend = choose_gemm("bias", x_MK, weight, out_MN)
        assert backend is not None, "all devices have a backend for a bias"
        _BIAS[backend](x_MK, weight, bias, out_MN)


def multiply_gelu_into(x: Tensor, weight: Weight, bias: Tensor, out: Tensor) -> None:
    """multiply_into() followed by GELU (tanh approximation), in the epilogue where a backend supports it."""
    for x_MK, out_MN in _matrices(x, out):  # noqa: N806
        backend = choose_gemm("gelu", x_MK, weight, out_MN)
        assert backend is not None, "all devices have a backend for GELU"
        _GELU[backend](x_MK, weight, bias, out_MN)


def try_add_gated(x: Tensor, weight: Weight, bias: Tensor, gate: Tensor, onto: Tensor) -> bool:
    """onto += gate * (x @ weight.T + bias), if an epilogue supports it for all rows of the batch.

    Shapes: x (B, tokens, K), gate (B, N), onto (B, tokens, N). Returns False, with `onto` unchanged, if no
    epilogue supports the addition.
    """
    rows = list(zip(x, gate, onto, strict=True))
    if not all(choose_gemm("gated addition", x_MK, weight, onto_MN) for x_MK, _, onto_MN in rows):
        return False
    for x_MK, gate_N, onto_MN in rows:  # noqa: N806
        _GATED_ADDITION["quack"](x_MK, weight, bias, gate_N, onto_MN)
    return True


def can_norm_rotate(x: Tensor, weight: Weight, out: Tensor) -> bool:
    """Whether multiply_norm_rotate_into() supports x (B, tokens, K) and out (B, tokens, N)."""
    return all(choose_gemm("norm and rotation", *pair) for pair in ((each, weight, to) for each, to in _rows(x, out)))


def supports_heads(head_size: int, norm_size: int, eps: float) -> bool:
    """Whether multiply_norm_rotate_into() supports the head size and the norms of heads."""
    return head_size == norm_size == HEAD_SIZE and eps == HEAD_EPS


def multiply_norm_rotate_into(
    x: Tensor, weight: Weight, bias: Tensor, scale: Tensor, angles: Tensor, out: Tensor
) -> None:
    """out = x @ weight.T + bias (B, tokens, N), followed by RMS norm of each head, scale (N,) and RoPE.

    `angles` are float32 (tokens, HEAD_SIZE): cos and sin of each pair of a head's channels, interleaved.
    """
    for x_MK, out_MN in _rows(x, out):  # noqa: N806
        _NORM_ROTATION["quack"](x_MK, weight, bias, scale, angles, out_MN)


@_BIAS.register("torch")
def _multiply_by_torch(x: Tensor, weight: Weight, bias: Tensor, out: Tensor) -> None:
    torch.addmm(bias, x, weight.values.t(), out=out)


@_BIAS.register("cublas_lt")
def _multiply_by_cublas_lt(x: Tensor, weight: Weight, bias: Tensor, out: Tensor) -> None:
    cublas_lt.linear_into(x, weight.values, bias, out)


@_BIAS.register("float8")
def _multiply_by_float8(x: Tensor, weight: Weight, bias: Tensor, out: Tensor) -> None:
    assert weight.scale is not None, "float8 values need a scale"
    write_float8_linear(x, weight.values, weight.scale, bias, out)


@_GELU.register("quack")
def _gelu_by_quack(x: Tensor, weight: Weight, bias: Tensor, out: Tensor) -> None:
    quack_gemm.gelu_into(x, weight.values, bias, out)


@_GELU.register("cublas_lt")
def _gelu_by_cublas_lt(x: Tensor, weight: Weight, bias: Tensor, out: Tensor) -> None:
    cublas_lt.linear_into(x, weight.values, bias, out, gelu=True)


@_GELU.register("torch_epilogue")
def _gelu_by_torch_epilogue(x: Tensor, weight: Weight, bias: Tensor, out: Tensor) -> None:
    torch._addmm_activation(bias, x, weight.values.t(), use_gelu=True, out=out)


@_GELU.register("float8")
@_GELU.register("torch")
def _gelu_in_two_passes(x: Tensor, weight: Weight, bias: Tensor, out: Tensor) -> None:
    write_gelu(multiply(x[None], weight, bias), out[None])


@_GATED_ADDITION.register("quack")
def _add_gated_by_quack(x: Tensor, weight: Weight, bias: Tensor, gate: Tensor, onto: Tensor) -> None:
    quack_gemm.add_gated(x, weight.values, bias, gate, onto)


@_NORM_ROTATION.register("quack")
def _norm_rotate_by_quack(x: Tensor, weight: Weight, bias: Tensor, scale: Tensor, angles: Tensor, out: Tensor) -> None:
    quack_gemm.normed_heads_into(x, weight.values, bias, scale, angles, out)


def _rows(x: Tensor, out: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x, out, strict=True))


def _matrices(x: Tensor, out: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs of matrices of x and out: a single pair if batch items are adjacent, otherwise a pair per item."""
    if len(x) == 1 or (_is_adjacent(x) and _is_adjacent(out)):
        return [(x.view(-1, x.shape[-1]) if _is_adjacent(x) else x[0], out.flatten(0, 1) if len(x) > 1 else out[0])]
    return _rows(x, out)


def _is_adjacent(x: Tensor) -> bool:
    return x.stride(0) == x.shape[1] * x.stride(1)
