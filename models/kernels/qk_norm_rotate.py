"""Norms and RoPE of queries and keys, with Triton in one pass over memory. Computes in float32.

Shapes: B batch, S tokens, D = heads * head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from models.kernels.backends import Operation
from models.kernels.qk_norm_parameters import NormParameters, QKNormParameters
from models.rotation import HeadRotation, Rotation, apply_rotary, rotate_heads

AnyRotation = Rotation | HeadRotation

_Run = Callable[[Tensor, QKNormParameters, AnyRotation | None, int, Tensor | None, Sequence[Tensor]], None]
_OPERATION: Operation[_Run] = Operation("norm and rotation")


def qk_norm_rotate(
    x: Tensor,
    norms: QKNormParameters,
    rotation: AnyRotation | None,
    first_tokens: int,
    square_sums: Tensor | None,
    out: Sequence[Tensor],
) -> None:
    """Apply norms and RoPE to the parts of x (B, S, parts * D), and write the results to `out`.

    `out` has a tensor (B, S, heads, head size) for each part, which may be a view of x. Parts without a norm come last,
    and are copied. The first `first_tokens` tokens are the first segment. `square_sums`, float32 (B, S, parts with a
    norm), are sums of squares over all ranks; they are required if x has only some of the channels of a norm.
    """
    # Triton's tl.arange() needs a power of two.
    is_power_of_two = norms.head_size.bit_count() == 1
    run = _OPERATION.for_device_of(x) if is_power_of_two else _OPERATION["torch"]
    run(x, norms, rotation, first_tokens, square_sums, out)


def split_heads(x: Tensor, head_size: int) -> Tensor:
    """View of x (..., D) as heads (..., heads, head size)."""
    return x.view(*x.shape[:-1], x.shape[-1] // head_size, head_size)


@_OPERATION.register("torch")
def _by_torch(
    x: Tensor,
    norms: QKNormParameters,
    rotation: AnyRotation | None,
    first_tokens: int,
    square_sums: Tensor | None,
    out: Sequence[Tensor],
) -> None:
    parts = x.chunk(len(out), dim=-1)
    normed = len(norms.rest)
    for index, part in enumerate(parts[:normed]):
        pieces = [
            _normalized(part[:, rows], norm, norms, None if square_sums is None else square_sums[:, rows, index, None])
            for rows, norm in (
                (slice(0, first_tokens), norms.first[index]),
                (slice(first_tokens, None), norms.rest[index]),
            )
        ]
        out[index].copy_(_rotated(split_heads(torch.cat(pieces, dim=1), norms.head_size), rotation))
    for part, copy in zip(parts[normed:], out[normed:], strict=True):
        copy.copy_(split_heads(part, norms.head_size))


@_OPERATION.register("triton")
def _by_triton(
    x: Tensor,
    norms: QKNormParameters,
    rotation: AnyRotation | None,
    first_tokens: int,
    square_sums: Tensor | None,
    out: Sequence[Tensor],
) -> None:
    # An optional package for GPUs.
    from models.kernels import triton_kernels

    triton_kernels.qk_norm_rotate(x, norms, rotation, first_tokens, square_sums, out)


def _rotated(heads: Tensor, rotation: AnyRotation | None) -> Tensor:
    """RoPE of heads (B, S, heads, head size)."""
    if isinstance(rotation, HeadRotation):
        return rotate_heads(heads, rotation)
    return heads if rotation is None else apply_rotary(heads, rotation)


def _normalized(x: Tensor, norm: NormParameters, norms: QKNormParameters, square_sums: Tensor | None) -> Tensor:
    """Norm of x (B, tokens, D). `square_sums` (B, tokens, 1) are required for a shard of the norm's channels."""
    if square_sums is not None:
        assert norm.weight is not None, "only RMS norms support sums of squares"
        scaled: Tensor = x.float() * torch.rsqrt(square_sums / norm.size + norm.eps) * norm.weight.float()
        return scaled.to(x.dtype)
    if norms.per_head:
        return _norm(split_heads(x, norms.head_size), norm).flatten(-2)
    return _norm(x, norm)


def _norm(x: Tensor, norm: NormParameters) -> Tensor:
    if norm.weight is None:
        return layer_norm(x, (norm.size,), eps=norm.eps)
    return rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
