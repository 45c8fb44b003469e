"""The fused kernels equal PyTorch's operators. They run in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from models.kernels import triton_kernels as kernels
from models.kernels.activation import gate_by_silu, write_gelu
from models.kernels.attention import merge_attention
from models.kernels.float8 import quantize_rows
from models.kernels.float8_format import FLOAT8
from models.kernels.qk_norm_parameters import QKNormParameters
from models.layers.norms import (
    LayerNormScaleShift,
    PlainLayerNorm,
    Residual,
    RMSNorm,
    RMSNormScaleShift,
)
from models.layers.qk_norm import QKNormModules, apply_qk_norm, head_views
from models.layers.rotary import rotary_embedding
from models.rotation import HeadRotation
from models.token_segments import SegmentVectors, TokenSegments

BATCH, TOKENS, FIRST, HEADS, HEAD = 2, 7, 3, 3, 32
SEGMENTS = TokenSegments((FIRST, TOKENS - FIRST))
SIZE = HEADS * HEAD
DTYPES = pytest.mark.parametrize(
    ("dtype", "max_error"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)], ids=["f32", "bf16"]
)

NORMS = pytest.mark.parametrize("norm", [LayerNormScaleShift(SIZE), RMSNormScaleShift(SIZE)], ids=["layer", "rms"])


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def assert_near(got: Tensor, expected: Tensor, max_error: float) -> None:
    assert got.dtype == expected.dtype
    assert float((got.float() - expected.float()).norm() / expected.float().norm()) <= max_error


def operands(norms: QKNormModules) -> QKNormParameters:
    """Parameters of the norms in the form that the kernel takes."""
    rest = tuple(norm.norm_parameters for norm in norms.norms)
    first = rest if norms.first is None else tuple(norm.norm_parameters for norm in norms.first)
    return QKNormParameters(first, rest, norms.head_size)


def modulations(dtype: torch.dtype) -> list[SegmentVectors]:
    """Scale, shift and gate of two token segments, as views of one tensor."""
    parts = torch.randn(BATCH, 6 * SIZE, dtype=dtype).chunk(6, dim=1)
    return [SEGMENTS.vectors(parts[start], parts[start + 1]) for start in (0, 2, 4)]


@DTYPES
@NORMS
def test_norm_scale_shift_equals_pytorch(dtype: torch.dtype, max_error: float, norm: LayerNormScaleShift) -> None:
    x = 1 + torch.randn(BATCH, TOKENS, SIZE, dtype=dtype)
    scale, shift, _ = modulations(dtype)
    got = kernels.norm_modulate(x, scale, shift, norm.eps, norm.is_centered)
    assert_near(got, norm(x, scale, shift), max_error)


@DTYPES
@NORMS
def test_gate_norm_scale_shift_equals_pytorch(dtype: torch.dtype, max_error: float, norm: LayerNormScaleShift) -> None:
    x, update = torch.randn(2, BATCH, TOKENS, SIZE, dtype=dtype).unbind(0)
    scale, shift, gate = modulations(dtype)
    got = kernels.gate_norm_modulate(x, update, gate, scale, shift, norm.eps, norm.is_centered)
    for mine, expected in zip(got, norm.after(Residual(x, update, gate), scale, shift), strict=True):
        assert_near(mine, expected, max_error)


@DTYPES
@pytest.mark.parametrize("boundary", [0, FIRST, TOKENS])
def test_modulations_of_two_tensors_equal_pytorch(dtype: torch.dtype, max_error: float, boundary: int) -> None:
    """Segments with different timesteps, each with its own tensor of modulations."""
    x, update = torch.randn(2, BATCH, TOKENS, SIZE, dtype=dtype).unbind(0)
    first, rest = (torch.randn(BATCH, 8, SIZE) for _ in range(2))
    segments = TokenSegments((boundary, TOKENS - boundary))
    scale, shift, gate = (segments.vectors(first[:, index], rest[:, index]) for index in (1, 2, 7))
    norm = LayerNormScaleShift(SIZE)
    got = kernels.gate_norm_modulate(x, update, gate, scale, shift, norm.eps, norm.is_centered)
    for mine, expected in zip(got, norm.after(Residual(x, update, gate), scale, shift), strict=True):
        assert_near(mine, expected, max_error)


@DTYPES
@pytest.mark.parametrize("last", [0, 2, TOKENS - FIRST])
def test_modulations_of_three_segments_equal_pytorch(dtype: torch.dtype, max_error: float, last: int) -> None:
    """The last tokens have a different timestep."""
    x, update = torch.randn(2, BATCH, TOKENS, SIZE, dtype=dtype).unbind(0)
    rows, own = (torch.randn(BATCH, 8 * SIZE, dtype=dtype).chunk(8, dim=1) for _ in range(2))
    segments = TokenSegments((FIRST, TOKENS - FIRST - last, last))
    scale, shift, gate = (segments.vectors(rows[index], rows[index + 1], own[index]) for index in (1, 3, 6))
    norm = LayerNormScaleShift(SIZE)
    got = kernels.gate_norm_modulate(x, update, gate, scale, shift, norm.eps, norm.is_centered)
    for mine, expected in zip(got, norm.after(Residual(x, update, gate), scale, shift), strict=True):
        assert_near(mine, expected, max_error)
    assert_near(kernels.norm_modulate(x, scale, shift, norm.eps, norm.is_centered), norm(x, scale, shift), max_error)


@DTYPES
@pytest.mark.parametrize("size", [HEAD, SIZE], ids=["per-head", "all-heads"])
@pytest.mark.parametrize("parts", [1, 2])
def test_qk_norm_rotary_equals_pytorch(dtype: torch.dtype, max_error: float, size: int, parts: int) -> None:
    each = [RMSNorm(size).to(dtype) for _ in range(2 * parts)]
    for norm in each:
        norm.weight.normal_()
    norms = QKNormModules(tuple(each[parts:]), HEAD, first=tuple(each[:parts]))
    rotation = rotary_embedding(torch.arange(TOKENS)[:, None], (HEAD,)) if parts == 2 else None
    qkv = torch.randn(BATCH, TOKENS, 3 * SIZE, dtype=dtype)
    expected = qkv.clone()
    apply_qk_norm(expected[..., : parts * SIZE], norms, rotation, SEGMENTS)
    qk = qkv[..., : parts * SIZE]
    kernels.qk_norm_rotate(qk, operands(norms), rotation, FIRST, None, head_views(qk, parts, HEAD))
    assert_near(qkv, expected, max_error)
    assert torch.equal(qkv[..., parts * SIZE :], expected[..., parts * SIZE :])


@DTYPES
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_layer_norm_of_heads_in_neox_style_equals_pytorch(heads: int, dtype: torch.dtype, max_error: float) -> None:
    """The two channels of a pair are half a head apart."""
    norm = PlainLayerNorm(HEAD)
    norms = QKNormModules((norm, norm), HEAD)
    angles = rotary_embedding(torch.arange(TOKENS)[:, None], (HEAD,))
    rotation = replace(angles, is_neox_style=True)
    qkv = 3 + torch.randn(BATCH, TOKENS, 3 * heads * HEAD, dtype=dtype)
    expected = qkv.clone()
    qk = slice(0, 2 * heads * HEAD)
    apply_qk_norm(expected[..., qk], norms, rotation, SEGMENTS)
    kernels.qk_norm_rotate(qkv[..., qk], operands(norms), rotation, FIRST, None, head_views(qkv[..., qk], 2, HEAD))
    assert_near(qkv, expected, max_error)
    neighbors = expected.clone()
    apply_qk_norm(neighbors[..., qk], norms, angles, SEGMENTS)
    assert not torch.allclose(neighbors, qkv, atol=0.1)


@DTYPES
@pytest.mark.parametrize("is_neox_style", [False, True], ids=["neighbors", "halves"])
@pytest.mark.parametrize("parts", [1, 2])
def test_qk_norm_with_angles_of_each_head_equals_pytorch(
    dtype: torch.dtype, max_error: float, parts: int, is_neox_style: bool
) -> None:
    """The angles of a rank's heads are a strided view: angles of consecutive tokens are not adjacent."""
    each = tuple(RMSNorm(SIZE).to(dtype) for _ in range(parts))
    for norm in each:
        norm.weight.copy_(torch.randn(SIZE))
    norms = QKNormModules(each, HEAD)
    angles = torch.randn(TOKENS, 2 * HEADS, HEAD // 2)
    rotation = HeadRotation(angles.cos()[:, HEADS:], angles.sin()[:, HEADS:], is_neox_style)
    x = torch.randn(BATCH, TOKENS, parts * SIZE, dtype=dtype)
    expected = x.clone()
    apply_qk_norm(expected, norms, rotation)
    kernels.qk_norm_rotate(x, operands(norms), rotation, 0, None, head_views(x, parts, HEAD))
    assert_near(x, expected, max_error)


def test_qk_norm_of_a_shard_uses_the_sums_of_all_heads() -> None:
    whole = torch.randn(1, TOKENS, 2 * SIZE)
    norm = RMSNorm(2 * SIZE)
    norm.weight.normal_()
    expected = norm(whole)[..., :SIZE]
    norm.weight = torch.nn.Parameter(norm.weight[:SIZE])
    part, sums = whole[..., :SIZE].contiguous(), whole.square().sum(-1, keepdim=True)
    kernels.qk_norm_rotate(part, operands(QKNormModules((norm,), HEAD)), None, 0, sums, head_views(part, 1, HEAD))
    assert_near(part, expected, 1e-6)


@pytest.mark.parametrize("normed", [1, 2])
def test_qk_norm_writes_into_an_output_and_copies_values(normed: int) -> None:
    """Rows of the batch may be far apart in the output, as in a buffer with tokens of other ranks."""
    each = [RMSNorm(HEAD) for _ in range(2 * normed)]
    for norm in each:
        norm.weight.normal_()
    norms = QKNormModules(tuple(each[normed:]), HEAD, first=tuple(each[:normed]))
    rotation = rotary_embedding(torch.arange(TOKENS)[:, None], (HEAD,))
    x = torch.randn(BATCH, TOKENS, (normed + 1) * SIZE)
    before = x.clone()
    expected, got = (torch.zeros(normed + 1, BATCH, 2 * TOKENS, HEADS, HEAD) for _ in range(2))
    apply_qk_norm(x, norms, rotation, SEGMENTS, out=expected[:, :, 3 : 3 + TOKENS].unbind())
    kernels.qk_norm_rotate(x, operands(norms), rotation, FIRST, None, got[:, :, 3 : 3 + TOKENS].unbind())
    assert_near(got, expected, 1e-6)
    assert torch.equal(got[normed], expected[normed])
    assert torch.equal(x, before)


@DTYPES
def test_gelu_into_columns_equals_pytorch(dtype: torch.dtype, max_error: float) -> None:
    hidden, expected = (
        torch.randn(BATCH, TOKENS, 4 * SIZE, dtype=dtype),
        torch.zeros(BATCH, TOKENS, 5 * SIZE, dtype=dtype),
    )
    got = expected.clone()
    write_gelu(hidden, expected[..., SIZE:])
    kernels.write_gelu(hidden, got[..., SIZE:])
    assert_near(got, expected, max_error)
    assert not got[..., :SIZE].any()


@DTYPES
def test_gate_by_silu_equals_pytorch(dtype: torch.dtype, max_error: float) -> None:
    """The input is a view of the first channels of a wider tensor."""
    x = torch.randn(BATCH, TOKENS, 3 * SIZE, dtype=dtype)[..., : 2 * SIZE]
    assert_near(kernels.gate_by_silu(x), gate_by_silu(x), max_error)


@DTYPES
def test_merge_attention_equals_pytorch(dtype: torch.dtype, max_error: float) -> None:
    """In memory, log-sum-exps have heads before tokens, as kernels return them. Some of their exponentials overflow."""
    parts = []
    for offset in (0.0, 1.0):
        lse = (torch.randn(BATCH, HEADS, TOKENS) + offset).transpose(1, 2)
        parts.append((torch.randn(BATCH, TOKENS, 3, HEADS, HEAD, dtype=dtype)[:, :, 1], lse))
    parts[0][1][:, 0] = 500.0
    parts[1][1][:, 1] = 500.0
    one, other = parts
    for wanted in (dtype, torch.float32):
        got, expected = kernels.merge_attention(one, other, wanted), merge_attention(one, other, wanted)
        assert_near(got[0], expected[0], max_error)
        assert_near(got[1], expected[1], 1e-6)


@DTYPES
def test_channel_norm_silu_equals_pytorch(dtype: torch.dtype, max_error: float) -> None:
    frame, weight = torch.randn(1, SIZE, 5, 7, dtype=dtype), torch.randn(SIZE, dtype=dtype)
    expected = silu(normalize(frame.float(), dim=1) * SIZE**0.5 * weight[:, None, None]).to(dtype)
    got = kernels.channel_norm_silu(frame, weight, SIZE**0.5)
    assert_near(got, expected, max_error)
    assert got.is_contiguous(memory_format=torch.channels_last)


@DTYPES
@pytest.mark.parametrize("stride", [SIZE, 2 * SIZE], ids=["adjacent", "apart"])
def test_quantize_rows_equals_pytorch(dtype: torch.dtype, max_error: float, stride: int) -> None:
    """The kernel writes float32: the interpreter rounds casts to float8 wrongly just below powers of two."""
    x = torch.randn(TOKENS, stride, dtype=dtype)[:, :SIZE] * torch.logspace(-4, 4, TOKENS, dtype=dtype)[:, None]
    x[1] = 0
    values, scale = kernels.quantize_rows(x, torch.float32)
    expected, own = quantize_rows(x)
    assert torch.equal(values.to(FLOAT8).float(), expected.float())
    assert_near(scale, own, max_error)
    assert kernels.quantize_rows(x)[0].dtype == FLOAT8
