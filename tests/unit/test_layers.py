"""The layers of DiTs against their definitions, written out."""

from __future__ import annotations

import math

import pytest
import torch

from models.layers.attention import attention
from models.layers.embeddings import EmbeddingMLP, sinusoidal_embedding
from models.layers.feed_forward import FeedForward
from models.layers.norms import LayerNormScaleShift, RMSNorm, apply_qk_norm
from models.layers.rotary import apply_rotary, rotary_embedding


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_attention() -> None:
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 8)
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(attention(q, k, v), torch.einsum("bhqk,bkhd->bqhd", weights, v))


def test_attention_mask() -> None:
    q, k, v = (torch.randn(1, 6, 2, 4) for _ in range(3))
    mask = torch.tensor([True] * 4 + [False] * 2)[None, None, None]
    torch.testing.assert_close(attention(q, k, v, mask), attention(q, k[:, :4], v[:, :4]))


def test_rotation_depends_on_distance_only() -> None:
    """The score of a query and a key is the same wherever the two are, on every axis."""
    x = torch.randn(2, 1, 1, 16)
    scores = []
    for offset in (0, 1000):
        ids = torch.tensor([[offset, 3 + offset, 5.0], [2 + offset, offset, 9.0]])
        turned = apply_rotary(x.transpose(0, 1), rotary_embedding(ids, (4, 6, 6)))[0, :, 0]
        scores.append(turned[0] @ turned[1])
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)


def test_rotation_turns_neighbouring_channels() -> None:
    rotation = rotary_embedding(torch.tensor([[math.pi / 2]]), (2,))
    turned = apply_rotary(torch.tensor([[[[1.0, 0.0]]]]), rotation)
    torch.testing.assert_close(turned.flatten(), torch.tensor([0.0, 1.0]), rtol=0, atol=1e-6)


def test_rotation_keeps_its_type_and_position_zero() -> None:
    x = torch.randn(1, 4, 2, 8, dtype=torch.bfloat16)
    assert torch.equal(apply_rotary(x, rotary_embedding(torch.zeros(4, 1), (8,))), x)


def test_layer_norm_scale_shift() -> None:
    x, scale, shift = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    expected = normed * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(LayerNormScaleShift(8)(x, scale, shift), expected)


def test_qk_norm_is_per_head() -> None:
    norm_q, norm_k = RMSNorm(8), RMSNorm(8)
    torch.nn.init.normal_(norm_k.weight)
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8)
    normed_q, normed_k = apply_qk_norm(q, k, norm_q, norm_k)
    torch.testing.assert_close(normed_q, q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    torch.testing.assert_close(normed_k, k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm_k.weight)


def test_sinusoidal_embedding() -> None:
    embedding = sinusoidal_embedding(torch.tensor([0.0, 250.0]), 256)
    assert torch.equal(embedding[0], torch.cat((torch.ones(128), torch.zeros(128))))
    angle = 250.0 * 10000 ** (-5 / 128)
    assert embedding[1, 5].item() == pytest.approx(math.cos(angle), abs=1e-4)
    assert embedding[1, 133].item() == pytest.approx(math.sin(angle), abs=1e-4)


def test_embedding_is_computed_in_the_weights_type() -> None:
    assert EmbeddingMLP(4, 8).bfloat16()(torch.randn(1, 4)).dtype == torch.bfloat16


def test_feed_forward_names_are_the_checkpoints() -> None:
    assert list(FeedForward(4).state_dict()) == ["net.0.proj.weight", "net.0.proj.bias", "net.2.weight", "net.2.bias"]
