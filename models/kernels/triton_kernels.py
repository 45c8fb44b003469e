"""Triton kernels between GEMM, attention and convolution calls, each in one pass over memory.

Each kernel is equivalent to the PyTorch implementation that is registered for the same operation. Arithmetic is in
float32. Gated additions and SwiGLU round an intermediate result to the stored dtype, as in PyTorch. The norms of heads
and of channels round only their results, whereas PyTorch also rounds in between.
"""

# ruff: noqa: ANN001, ANN202, N803  (Triton kernels have no annotations; their constexpr arguments are in capitals)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels.float8_format import FLOAT8, LARGEST, SMALLEST_MAGNITUDE
from models.rotation import HeadRotation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.kernels.qk_norm_parameters import QKNormParameters
    from models.rotation import Rotation
    from models.token_segments import SegmentVectors


@triton.jit
def _of_two(first_ptr, rest_ptr, is_first, offsets, mask):
    if is_first:
        values = tl.load(first_ptr + offsets, mask=mask, other=0.0)
    else:
        values = tl.load(rest_ptr + offsets, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _of_segment(first_ptr, rest_ptr, last_ptr, is_first, is_last, offsets, mask):
    if is_last:
        values = tl.load(last_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        values = _of_two(first_ptr, rest_ptr, is_first, offsets, mask)
    return values


@triton.jit
def _gate_norm_scale_shift_kernel(
    x_ptr, update_ptr, first_gate, second_gate, last_gate, first_scale, second_scale, last_scale, first_shift,
    second_shift, last_shift, sum_ptr, normed_ptr, tokens, first_end, last_start, size, gate_stride, modulation_stride,
    eps, HAS_UPDATE: tl.constexpr, CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    batch, token = row // tokens, row % tokens
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    at = row.to(tl.int64) * size + columns
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    is_first, is_last = token < first_end, token >= last_start
    if HAS_UPDATE:
        update = tl.load(update_ptr + at, mask=mask, other=0.0).to(tl.float32)
        gate_at = batch * gate_stride + columns
        x += update * _of_segment(first_gate, second_gate, last_gate, is_first, is_last, gate_at, mask)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    centered = x
    if CENTERED:
        centered = tl.where(mask, x - tl.sum(x, axis=0) / size, 0.0)
    variance = tl.sum(centered * centered, axis=0) / size
    where = batch * modulation_stride + columns
    scale = _of_segment(first_scale, second_scale, last_scale, is_first, is_last, where, mask)
    shift = _of_segment(first_shift, second_shift, last_shift, is_first, is_last, where, mask)
    normed = centered * tl.rsqrt(variance + eps) * (1 + scale) + shift
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=mask)


def norm_modulate(x: Tensor, scale: SegmentVectors, shift: SegmentVectors, eps: float, is_centered: bool) -> Tensor:
    """See models.kernels.norm_modulate.norm_modulate; x is (B, S, D)."""
    x = x.contiguous()
    normed = torch.empty_like(x)
    _launch_norm(x, None, None, scale, shift, x, normed, eps, is_centered)
    return normed


def gate_norm_modulate(
    x: Tensor,
    update: Tensor,
    gate: SegmentVectors,
    scale: SegmentVectors,
    shift: SegmentVectors,
    eps: float,
    is_centered: bool,
) -> tuple[Tensor, Tensor]:
    """See models.kernels.norm_modulate.gate_norm_modulate; x and update are (B, S, D)."""
    x = x.contiguous()
    added, normed = torch.empty_like(x), torch.empty_like(x)
    _launch_norm(x, update.contiguous(), gate, scale, shift, added, normed, eps, is_centered)
    return added, normed


def _launch_norm(
    x: Tensor,
    update: Tensor | None,
    gate: SegmentVectors | None,
    scale: SegmentVectors,
    shift: SegmentVectors,
    added: Tensor,
    normed: Tensor,
    eps: float,
    is_centered: bool,
) -> None:
    batch, tokens, size = x.shape
    given = [each for each in (scale, shift, gate) if each is not None]
    ends = {_ends(each, tokens) for each in given if len(each.vectors) > 1} or {(0, tokens)}
    assert len(ends) == 1, "scale, shift and gate must have the same segments"
    (first_end, last_start), *_ = ends
    scales, shifts = _three(scale), _three(shift)
    gates = [x, x, x] if gate is None else _three(gate)
    strides = {each.stride(0) for each in (*scales, *shifts)}
    assert len(strides) == 1, "scales and shifts must be parts of tensors of one shape"
    assert len({each.stride(0) for each in gates}) == 1, "gates must be parts of tensors of one shape"
    block = triton.next_power_of_2(size)
    _gate_norm_scale_shift_kernel[(batch * tokens,)](
        x, x if update is None else update, *gates, *scales, *shifts, added, normed,
        tokens, first_end, last_start, size, gates[0].stride(0), strides.pop(), eps,
        HAS_UPDATE=update is not None, CENTERED=is_centered, BLOCK=block, num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip


def _ends(vectors: SegmentVectors, tokens: int) -> tuple[int, int]:
    """End of the first of three segments, and start of the last one."""
    assert vectors.segments is not None, "several vectors need segments"
    first, _, *last = vectors.segments.lengths
    return first, tokens - sum(last)


def _three(vectors: SegmentVectors) -> list[Tensor]:
    """A vector for each of three segments, which the kernel expects."""
    first, *others = vectors.vectors
    assert len(others) <= 2, "the kernel supports at most three segments"
    second = others[0] if others else first
    return [first, second, others[1] if len(others) == 2 else second]


@triton.jit
def _head_norm_rotary_kernel(
    x_ptr, out_0, out_1, out_2, first_0, rest_0, first_1, rest_1, cos_ptr, sin_ptr, sums_ptr,
    tokens, first_tokens, heads, x_batch, x_token, part_stride, angle_token, eps, normed_size,
    batch_0, token_0, batch_1, token_1, batch_2, token_2,
    NORMED: tl.constexpr, HEAD: tl.constexpr, HEADS: tl.constexpr, PER_HEAD: tl.constexpr, ROTATE: tl.constexpr,
    HAS_SUMS: tl.constexpr, IS_LAYER_NORM: tl.constexpr, BY_HEAD: tl.constexpr, IS_NEOX: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    batch, token = (row // tokens).to(tl.int64), row % tokens
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, HEAD)[None, :]
    inside = head * HEAD + channel
    mask = (head < heads) & (channel < HEAD)
    far = token.to(tl.int64)
    at = x_ptr + batch * x_batch + far * x_token + part * part_stride + inside
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if part < NORMED:
        is_first = token < first_tokens
        if IS_LAYER_NORM:
            x = x - tl.sum(x, axis=1)[:, None] / HEAD
        if PER_HEAD:
            square = tl.sum(x * x, axis=1)[:, None]
            weight_at = channel + head * 0
        else:
            square = tl.sum(tl.sum(x * x, axis=1), axis=0)
            weight_at = inside
        if HAS_SUMS:
            square = tl.load(sums_ptr + row * NORMED + part)
        x = x * tl.rsqrt(square / normed_size + eps)
        if not IS_LAYER_NORM:
            if part == 0:
                x = x * _of_two(first_0, rest_0, is_first, weight_at, mask)
            else:
                x = x * _of_two(first_1, rest_1, is_first, weight_at, mask)
        if ROTATE:
            pair = far * angle_token + tl.arange(0, HEAD // 2)[None, :]
            if BY_HEAD:
                pair += head * (HEAD // 2)
                cos = tl.load(cos_ptr + pair, mask=head < heads, other=0.0)
                sin = tl.load(sin_ptr + pair, mask=head < heads, other=0.0)
            else:
                cos, sin = tl.load(cos_ptr + pair), tl.load(sin_ptr + pair)
            if IS_NEOX:
                first, second = tl.split(tl.permute(tl.reshape(x, (HEADS, 2, HEAD // 2)), (0, 2, 1)))
            else:
                first, second = tl.split(tl.reshape(x, (HEADS, HEAD // 2, 2)))
            rotated = tl.join(first * cos - second * sin, second * cos + first * sin)
            if IS_NEOX:
                rotated = tl.permute(rotated, (0, 2, 1))
            x = tl.reshape(rotated, (HEADS, HEAD))
    result = x.to(x_ptr.dtype.element_ty)
    if part == 0:
        tl.store(out_0 + batch * batch_0 + far * token_0 + inside, result, mask=mask)
    elif part == 1:
        tl.store(out_1 + batch * batch_1 + far * token_1 + inside, result, mask=mask)
    else:
        tl.store(out_2 + batch * batch_2 + far * token_2 + inside, result, mask=mask)


def qk_norm_rotate(
    x: Tensor,
    norms: QKNormParameters,
    rotation: Rotation | HeadRotation | None,
    first_tokens: int,
    square_sums: Tensor | None,
    out: Sequence[Tensor],
) -> None:
    """See models.kernels.qk_norm_rotate.qk_norm_rotate. x has one to three parts; the head size is a power of two."""
    batch, tokens, width = x.shape
    size = width // len(out)
    heads, head_size = size // norms.head_size, norms.head_size
    assert x.stride(2) == 1, "channels must be adjacent"
    assert all(each.stride(3) == 1 and each.stride(2) == head_size for each in out), "channels must be adjacent"
    weights = norms.weights or [x, x]
    cos, sin = (x, x) if rotation is None else (rotation.cos, rotation.sin)
    assert rotation is None or cos.ndim == 2 or cos.stride(1) == head_size // 2, "a token's angles must be adjacent"
    results = [out[min(part, len(out) - 1)] for part in range(3)]
    block = triton.next_power_of_2(heads)
    _head_norm_rotary_kernel[(batch * tokens, len(out))](
        x, *results, *weights[:2], *weights[-2:], cos, sin, x if square_sums is None else square_sums,
        tokens, first_tokens, heads, *x.stride()[:2], size, cos.stride(0), norms.rest[0].eps, norms.rest[0].size,
        *(stride for result in results for stride in result.stride()[:2]),
        NORMED=len(norms.rest), HEAD=head_size, HEADS=block, PER_HEAD=norms.per_head, ROTATE=rotation is not None,
        HAS_SUMS=square_sums is not None, IS_LAYER_NORM=not norms.weights, BY_HEAD=isinstance(rotation, HeadRotation),
        IS_NEOX=rotation is not None and rotation.is_neox_style, num_warps=max(1, min(8, block * head_size // 512)),
    )  # fmt: skip


@triton.jit
def _gelu_kernel(x_ptr, out_ptr, tokens, size, x_batch, x_token, out_batch, out_token, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    inside = column < size
    x = tl.load(x_ptr + batch * x_batch + token * x_token + column, mask=inside, other=0.0).to(tl.float32)
    # 0.5 * (1 + tanh(u)) = sigmoid(2 * u)
    gelu = x * tl.sigmoid(2 * 0.7978845608028654 * (x + 0.044715 * x * x * x))
    tl.store(out_ptr + batch * out_batch + token * out_token + column, gelu.to(out_ptr.dtype.element_ty), mask=inside)


def write_gelu(x: Tensor, out: Tensor) -> None:
    """See models.kernels.activation.write_gelu."""
    batch, tokens, size = x.shape
    assert all(each.stride(2) == 1 for each in (x, out)), "channels must be adjacent"
    block = 4096
    grid = (batch * tokens, triton.cdiv(size, block))
    _gelu_kernel[grid](x, out, tokens, size, *x.stride()[:2], *out.stride()[:2], BLOCK=block, num_warps=8)


@triton.jit
def _gate_by_silu_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(x_ptr + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    rounded = (gate * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * size + column, (rounded * x).to(out_ptr.dtype.element_ty), mask=inside)


def gate_by_silu(x: Tensor) -> Tensor:
    """See models.kernels.activation.gate_by_silu."""
    x = x.contiguous()
    batch, tokens, size = x.shape
    out = x.new_empty(batch, tokens, size // 2)
    block = 4096
    _gate_by_silu_kernel[(batch * tokens, triton.cdiv(size // 2, block))](x, out, size // 2, BLOCK=block, num_warps=8)
    return out


@triton.jit
def _quantize_rows_kernel(
    x_ptr, values_ptr, scale_ptr, size, stride, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = column < size
    x = tl.load(x_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    most = tl.maximum(tl.max(tl.abs(x), axis=0), SMALLEST)
    tl.store(scale_ptr + row, most / LARGEST)
    tl.store(values_ptr + row * size + column, (x * (LARGEST / most)).to(values_ptr.dtype.element_ty), mask=mask)


def quantize_rows(x: Tensor, dtype: torch.dtype = FLOAT8) -> tuple[Tensor, Tensor]:
    """See models.kernels.float8.quantize_rows. `dtype` is the values' dtype; channels of x must be adjacent."""
    rows, size = x.shape
    assert x.stride(1) == 1, "channels must be adjacent"
    values = torch.empty(rows, size, dtype=dtype, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    if rows:
        _quantize_rows_kernel[(rows,)](
            x, values, scale, size, x.stride(0), LARGEST=LARGEST, SMALLEST=SMALLEST_MAGNITUDE,
            BLOCK=block, num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
    return values, scale


@triton.jit
def _channel_norm_silu_kernel(
    x_ptr, weight_ptr, out_ptr, pixels, channels, root, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    mask = (row < pixels) & (channel < channels)
    at = row * channels + channel
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)[:, None]
    normed = x / length * root * weight
    tl.store(out_ptr + at, (normed * tl.sigmoid(normed)).to(out_ptr.dtype.element_ty), mask=mask)


def channel_norm_silu(frame: Tensor, weight: Tensor, root: float) -> Tensor:
    """See models.kernels.channel_norm.channel_norm_silu."""
    frame = frame.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(frame)
    channels = frame.shape[1]
    pixels = frame.numel() // channels
    block = triton.next_power_of_2(channels)
    rows = max(1, 4096 // block)
    _channel_norm_silu_kernel[(triton.cdiv(pixels, rows),)](
        frame, weight, out, pixels, channels, root, ROWS=rows, BLOCK=block, num_warps=8
    )
    return out


@triton.jit
def _merge_attention_kernel(
    one_ptr, one_lse_ptr, other_ptr, other_lse_ptr, out_ptr, lse_ptr, tokens, heads, size,
    one_batch, one_token, one_head, one_lse_batch, one_lse_token, one_lse_head,
    other_batch, other_token, other_head, other_lse_batch, other_lse_token, other_lse_head,
    HEAD: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, HEAD)[None, :]
    inside = head < heads
    mask = inside & (channel < size)
    one_at = batch * one_lse_batch + token * one_lse_token + head * one_lse_head
    other_at = batch * other_lse_batch + token * other_lse_token + head * other_lse_head
    one_lse = tl.load(one_lse_ptr + one_at, mask=inside, other=0.0)
    other_lse = tl.load(other_lse_ptr + other_at, mask=inside, other=0.0)
    most = tl.maximum(one_lse, other_lse)
    one_weight, other_weight = tl.exp(one_lse - most), tl.exp(other_lse - most)
    total = one_weight + other_weight
    tl.store(lse_ptr + row * heads + head, most + tl.log(total), mask=inside)
    one_at = batch * one_batch + token * one_token + head * one_head + channel
    other_at = batch * other_batch + token * other_token + head * other_head + channel
    one = tl.load(one_ptr + one_at, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(other_ptr + other_at, mask=mask, other=0.0).to(tl.float32)
    merged = (one * one_weight + other * other_weight) / total
    tl.store(out_ptr + (row * heads + head) * size + channel, merged.to(out_ptr.dtype.element_ty), mask=mask)


def merge_attention(
    one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See models.kernels.attention.merge_attention."""
    batch, tokens, heads, size = one[0].shape
    assert one[0].stride(3) == other[0].stride(3) == 1, "channels must be adjacent"
    out = one[0].new_empty(one[0].shape, dtype=dtype)
    lse = one[1].new_empty(one[1].shape)
    head, block = triton.next_power_of_2(size), triton.next_power_of_2(heads)
    strides = [stride for each in (*one, *other) for stride in each.stride()[:3]]
    _merge_attention_kernel[(batch * tokens,)](
        *one, *other, out, lse, tokens, heads, size, *strides,
        HEAD=head, HEADS=block, num_warps=max(1, min(8, block * head // 512)),
    )  # fmt: skip
    return out, lse
