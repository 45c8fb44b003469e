"""Layers of DiTs against reference implementations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from models.kernels import quack_gemm
from models.kernels.activation import write_gelu
from models.kernels.attention import attention
from models.kernels.attention_backends import head_shares
from models.layers.embeddings import EmbeddingMLP, sinusoidal_embedding
from models.layers.feed_forward import FeedForward
from models.layers.linear import JoinedLinear, Linear, project
from models.layers.norms import LayerNormScaleShift, Residual, RMSNorm
from models.layers.qk_norm import QKNormModules, apply_qk_norm
from models.layers.rotary import rotary_embedding
from models.rotation import apply_rotary
from models.token_segments import SegmentVectors, TokenSegments


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_attention_matches_its_definition() -> None:
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 8)
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(attention(q, k, v), torch.einsum("bhqk,bkhd->bqhd", weights, v))


def test_a_mask_excludes_keys() -> None:
    q, k, v = (torch.randn(1, 6, 2, 4) for _ in range(3))
    mask = torch.tensor([True] * 4 + [False] * 2)[None, None, None]
    torch.testing.assert_close(attention(q, k, v, mask), attention(q, k[:, :4], v[:, :4]))


def test_rope_scores_depend_on_distance_only() -> None:
    """Equal offsets of query and key positions on an axis leave the score unchanged."""
    x = torch.randn(2, 1, 1, 16)
    scores = []
    for offset in (0, 1000):
        ids = torch.tensor([[offset, 3 + offset, 5.0], [2 + offset, offset, 9.0]])
        rotated = apply_rotary(x.transpose(0, 1), rotary_embedding(ids, (4, 6, 6)))[0, :, 0]
        scores.append(rotated[0] @ rotated[1])
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)


def test_rope_rotates_adjacent_channels() -> None:
    rotation = rotary_embedding(torch.tensor([[math.pi / 2]]), (2,))
    rotated = apply_rotary(torch.tensor([[[[1.0, 0.0]]]]), rotation)
    torch.testing.assert_close(rotated.flatten(), torch.tensor([0.0, 1.0]), rtol=0, atol=1e-6)


def test_rope_preserves_dtype_and_position_zero() -> None:
    x = torch.randn(1, 4, 2, 8, dtype=torch.bfloat16)
    assert torch.equal(apply_rotary(x, rotary_embedding(torch.zeros(4, 1), (8,))), x)


def test_layer_norm_scale_shift_matches_its_definition() -> None:
    x, scale, shift = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    expected = normed * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(
        LayerNormScaleShift(8)(x, SegmentVectors.same(scale), SegmentVectors.same(shift)), expected
    )


def test_each_segment_has_its_own_modulation_and_gate() -> None:
    norm, segments = LayerNormScaleShift(8), TokenSegments((2, 3))
    x, update = torch.randn(2, 2, 5, 8).unbind(0)
    vectors = torch.randn(3, 2, 2, 8)
    scale, shift, gate = vectors
    pairs = [segments.vectors(text, image) for text, image in vectors]
    added, normed = norm.after(Residual(x, update, pairs[2]), pairs[0], pairs[1])
    for segment, rows in enumerate(segments.slices()):
        expected = x[:, rows] + gate[segment][:, None] * update[:, rows]
        torch.testing.assert_close(added[:, rows], expected)
        alone = norm(expected, SegmentVectors.same(scale[segment]), SegmentVectors.same(shift[segment]))
        torch.testing.assert_close(normed[:, rows], alone)


@pytest.mark.parametrize("smallest", [1, 3, 9], ids=["all-segments", "segments-of-3-rows-or-more", "no-segment"])
@pytest.mark.parametrize("boundary", [0, 2, 5])
@pytest.mark.parametrize("are_equal", [False, True])
def test_a_gated_update_of_two_segments_matches_the_reference(
    monkeypatch: pytest.MonkeyPatch, smallest: int, boundary: int, are_equal: bool
) -> None:
    """The fake fuses GEMMs of segments with at least `smallest` rows, as a GPU does."""
    fused: list[int] = []

    def add_gated(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, onto: Tensor) -> None:
        fused.append(len(x))
        onto += gate * (x @ weight.T + bias)

    monkeypatch.setattr(quack_gemm, "can_add", lambda x, *_: len(x) >= smallest)
    monkeypatch.setattr(quack_gemm, "add_gated", add_gated)
    layer, stream, x = Linear(6, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    text, image = torch.randn(2, 2, 4).unbind()
    segments = TokenSegments((boundary, 5 - boundary))
    gate = segments.vectors(image, image) if are_equal else segments.vectors(text, image)
    with torch.inference_mode():
        expected = Residual(stream, layer(x), gate).added()
        got = layer.add_gated(stream.clone(), x, gate).added()
    torch.testing.assert_close(got, expected)
    lengths = [5] if are_equal or boundary in (0, 5) else [5 - boundary, boundary]
    any_is_fused = lengths[0] >= smallest
    assert fused == [rows for rows in lengths if any_is_fused and rows >= smallest for _ in range(2)]


@pytest.mark.parametrize(
    ("tiles", "heads", "shares"),
    [
        pytest.param(36, 24, [(0, 24, 1)], id="flux: a split saves too little, 6.6 waves instead of 7"),
        pytest.param(18, 24, [(0, 22, 1), (22, 24, 3)], id="flux on two gpus: 3.3 waves instead of 4"),
        pytest.param(34, 24, [(0, 23, 1), (23, 24, 3)], id="qwen-image: 6.3 waves instead of 7"),
        pytest.param(256, 12, [(0, 12, 1)], id="wan: a head takes more than one wave"),
        pytest.param(3, 12, [(0, 12, 1)], id="all heads in one wave"),
        pytest.param(11, 24, [(0, 24, 1)], id="two full waves"),
    ],
)
def test_head_shares_split_the_heads_of_an_incomplete_wave(
    tiles: int, heads: int, shares: list[tuple[int, int, int]]
) -> None:
    found = [(part.start, part.stop, splits) for part, splits in head_shares(tiles, heads, processors=132)]
    assert found == shares


@pytest.mark.parametrize("rotated", [False, True])
def test_qk_norm_is_per_head_and_per_segment(rotated: bool) -> None:
    norms = [RMSNorm(8) for _ in range(4)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    rotation = rotary_embedding(torch.arange(4.0)[:, None], (8,)) if rotated else None
    qk = torch.randn(1, 4, 2 * 16)
    expected = []
    for part, pair in zip(qk.view(1, 4, 2, 2, 8).unbind(2), zip(norms[:2], norms[2:], strict=True), strict=True):
        weight = torch.stack((pair[0].weight, *[pair[1].weight] * 3))[None, :, None]
        normed = part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        expected.append(normed if rotation is None else apply_rotary(normed, rotation))
    with torch.inference_mode():
        apply_qk_norm(
            qk, QKNormModules((norms[2], norms[3]), 8, first=(norms[0], norms[1])), rotation, TokenSegments((1, 3))
        )
    torch.testing.assert_close(qk, torch.stack(expected, dim=2).flatten(2))


def test_qk_norm_covers_all_heads() -> None:
    norm = RMSNorm(16)
    q = torch.randn(1, 4, 16)
    expected = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    with torch.inference_mode():
        apply_qk_norm(q, QKNormModules((norm,), 8))
    torch.testing.assert_close(q, expected)


def test_qk_norm_with_out_normalizes_keys_and_copies_values() -> None:
    norm = RMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    kv, buffer = torch.randn(2, 4, 32), torch.zeros(2, 2, 9, 2, 8)
    before = kv.clone()
    with torch.inference_mode():
        expected = norm(kv[..., :16].view(2, 4, 2, 8))
        apply_qk_norm(kv, QKNormModules((norm,), 8), out=tuple(buffer[:, :, 3:7]))
    torch.testing.assert_close(buffer[0, :, 3:7], expected)
    assert torch.equal(buffer[1, :, 3:7], before[..., 16:].view(2, 4, 2, 8))
    assert torch.equal(kv, before)
    assert not buffer[:, :, :3].any()
    assert not buffer[:, :, 7:].any()


def test_joined_layers_match_their_parts() -> None:
    layers = [Linear(6, 4), Linear(6, 4)]
    x, out = torch.randn(2, 3, 6), torch.empty(2, 3, 8)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    before = [layer.weight.clone() for layer in layers]
    joined = JoinedLinear(layers)
    with torch.inference_mode():
        for given in (None, joined):
            project(x, out.zero_(), given, layers)
            torch.testing.assert_close(out, expected)
            for which in (slice(0, 1), slice(1, 3)):
                first, last = (sum(len(layer.weight) for layer in layers[:each]) for each in (which.start, which.stop))
                part = torch.zeros_like(expected[..., first:last])
                project(x, part, given, layers, which)
                torch.testing.assert_close(part, expected[..., first:last])
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))
    assert joined.weight.values.untyped_storage().data_ptr() == layers[1].weight.untyped_storage().data_ptr()


def test_a_layer_writes_into_a_slice_of_tokens() -> None:
    layer = Linear(6, 4)
    x, out = torch.randn(2, 5, 6), torch.zeros(2, 5, 4)
    with torch.inference_mode():
        layer.into(x[:, 1:3], out[:, 1:3])
        layer.gelu_into(x[:, 3:], out[:, 3:])
        torch.testing.assert_close(out[:, 1:3], layer(x[:, 1:3]))
        torch.testing.assert_close(out[:, 3:], gelu(layer(x[:, 3:]), approximate="tanh"))
    assert not out[:, :1].any()


def test_write_gelu_writes_a_slice_of_columns() -> None:
    hidden, out = torch.randn(2, 3, 16), torch.zeros(2, 3, 20)
    write_gelu(hidden, out[..., 4:])
    torch.testing.assert_close(out[..., 4:], gelu(hidden, approximate="tanh"))
    assert not out[..., :4].any()


def test_sinusoidal_embedding_matches_its_definition() -> None:
    embedding = sinusoidal_embedding(torch.tensor([0.0, 250.0]), 256)
    assert torch.equal(embedding[0], torch.cat((torch.ones(128), torch.zeros(128))))
    angle = 250.0 * 10000 ** (-5 / 128)
    assert embedding[1, 5].item() == pytest.approx(math.cos(angle), abs=1e-4)
    assert embedding[1, 133].item() == pytest.approx(math.sin(angle), abs=1e-4)


def test_embedding_is_computed_in_the_dtype_of_the_weights() -> None:
    assert EmbeddingMLP(4, 8).bfloat16()(torch.randn(1, 4)).dtype == torch.bfloat16


def test_feed_forward_parameter_names_equal_those_of_checkpoints() -> None:
    assert list(FeedForward(4).state_dict()) == ["net.0.proj.weight", "net.0.proj.bias", "net.2.weight", "net.2.bias"]
