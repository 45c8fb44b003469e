"""Layer norm or RMS norm without weights, then scale and shift; optionally after a gated addition.

Statistics and modulation are computed in float32; results are in x's dtype. Shapes: B batch, S tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from models.kernels.backends import Operation
from models.token_segments import SegmentVectors


class Modulated(NamedTuple):
    """Parameters of norm(x) * (1 + scale) + shift. `is_centered`: layer norm; otherwise RMS norm."""

    scale: SegmentVectors
    shift: SegmentVectors
    eps: float
    is_centered: bool


_PLAIN: Operation[Callable[[Tensor, Modulated], Tensor]] = Operation("norm and modulation")
_GATED: Operation[Callable[[Tensor, Tensor, SegmentVectors, Modulated], tuple[Tensor, Tensor]]] = Operation(
    "gated addition, norm and modulation"
)


def norm_modulate(x: Tensor, modulated: Modulated) -> Tensor:
    """norm(x) * (1 + scale) + shift of x (B, S, D)."""
    return _PLAIN.for_device_of(x)(x, modulated)


def gate_norm_modulate(x: Tensor, update: Tensor, gate: SegmentVectors, modulated: Modulated) -> tuple[Tensor, Tensor]:
    """x + gate * update (B, S, D), and norm_modulate() of the sum."""
    return _GATED.for_device_of(x)(x, update, gate, modulated)


def add_update(x: Tensor, update: Tensor, gate: SegmentVectors) -> Tensor:
    """x + gate * update (B, S, D), computed in float32 and returned in x's dtype."""
    return (x.float() + update.float() * gate.by_token().float()).to(x.dtype)


@_PLAIN.register("torch")
def _norm_modulate(x: Tensor, modulated: Modulated) -> Tensor:
    scale, shift = (each.by_token().float() for each in (modulated.scale, modulated.shift))
    norm = layer_norm if modulated.is_centered else rms_norm
    normed = norm(x.float(), (x.shape[-1],), eps=modulated.eps)
    return (normed * (1 + scale) + shift).to(x.dtype)


@_GATED.register("torch")
def _gate_norm_modulate(x: Tensor, update: Tensor, gate: SegmentVectors, modulated: Modulated) -> tuple[Tensor, Tensor]:
    added = add_update(x, update, gate)
    return added, _norm_modulate(added, modulated)


@_PLAIN.register("triton")
def _norm_modulate_by_triton(x: Tensor, modulated: Modulated) -> Tensor:
    # An optional package for GPUs.
    from models.kernels import triton_kernels

    return triton_kernels.norm_modulate(x, *modulated)


@_GATED.register("triton")
def _gate_norm_modulate_by_triton(
    x: Tensor, update: Tensor, gate: SegmentVectors, modulated: Modulated
) -> tuple[Tensor, Tensor]:
    # An optional package for GPUs.
    from models.kernels import triton_kernels

    return triton_kernels.gate_norm_modulate(x, update, gate, *modulated)
