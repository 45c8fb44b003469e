"""Layers with fused GEMM epilogues, compared with the same layers without fusion.

The kernels need a GPU; tests/bench/kernel_energy.py checks and times them there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from models.kernels import quack_gemm
from models.kernels.gemm_support import HEAD_EPS, HEAD_SIZE
from models.layers.attention import SelfAttention
from models.layers.feed_forward import FeedForward
from models.layers.joint_attention import JointAttention, Modulation, joint_block
from models.layers.linear import Linear, join_all_weights
from models.layers.norms import LayerNormScaleShift, Residual
from models.layers.rotary import rotary_embedding
from models.layers.step_cache import CacheUse, StepCache, run_blocks
from models.rotation import apply_rotary
from models.token_segments import SegmentVectors, TokenSegments

HEAD = HEAD_SIZE
SIZE, TOKENS, MIN_ROWS = 2 * HEAD, 7, 4
SEGMENTS = TokenSegments((2, 5))


class Kernels:
    """The fused GEMMs in PyTorch, with the number of calls of each."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def gelu_into(self, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
        self.calls["gelu_into"] += 1
        out.copy_(gelu(linear(x, weight, bias), approximate="tanh"))

    def add_gated(self, x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, onto: Tensor) -> None:
        self.calls["add_gated"] += 1
        assert gate.shape == bias.shape
        onto += gate * linear(x, weight, bias)

    def normed_heads_into(
        self, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, angles: Tensor, out: Tensor
    ) -> None:
        self.calls["normed_heads_into"] += 1
        assert angles.shape == (len(x), HEAD)
        heads = linear(x, weight, bias).view(len(x), -1, HEAD)
        heads = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + HEAD_EPS)
        cos, sin = angles.view(len(x), 1, -1, 2).unbind(-1)
        even, odd = (heads * scale.view(-1, HEAD)).view(len(x), -1, HEAD // 2, 2).unbind(-1)
        out.copy_(torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-3))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    found = Kernels()
    monkeypatch.setattr(quack_gemm, "_epilogues", lambda: found)
    return found


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse GEMMs of MIN_ROWS rows or more."""
    for name in ("can_fuse", "can_add"):
        monkeypatch.setattr(quack_gemm, name, lambda x, _, __: len(x) >= MIN_ROWS)


def random_weights(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    join_all_weights(module)
    return module


class Block(nn.Module):
    """A block of two token segments, with norms, joint attention, feed-forwards and modulations."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = LayerNormScaleShift(SIZE)
        self.attn = JointAttention(SIZE, HEAD)
        self.feed_forwards = nn.ModuleList((FeedForward(SIZE), FeedForward(SIZE)))
        parts = [SEGMENTS.vectors(*pair) for pair in torch.randn(6, 2, 1, SIZE).unbind()]
        self.modulations = (Modulation(*parts[:3]), Modulation(*parts[3:]))

    def forward(self, residual: Residual) -> Residual:
        text, image = (cast("FeedForward", each) for each in self.feed_forwards)
        rotation = rotary_embedding(torch.arange(TOKENS)[:, None], (HEAD,))
        return joint_block(residual, self.norm, self.attn, (text, image), self.modulations, rotation, SEGMENTS)


def test_a_fused_block_of_two_segments_equals_the_unfused_block(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x = random_weights(Block()), torch.randn(1, TOKENS, SIZE)
    expected = block(Residual(x)).added()
    fuse(monkeypatch)
    torch.testing.assert_close(block(Residual(x)).added(), expected)
    # Only the image segment is fused: the text segment has too few rows.
    assert kernels.calls == {"normed_heads_into": 1, "gelu_into": 1}


class AddingBlock(nn.Module):
    """A block of one token segment that adds the gated output of a linear layer."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.layer = Linear(SIZE, SIZE)
        self.gate = SegmentVectors.same(torch.randn(batch, SIZE))

    def forward(self, residual: Residual) -> Residual:
        stream = residual.added()
        return self.layer.add_gated(stream, torch.tanh(stream), self.gate)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_fused_gated_update_is_added_in_place(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    block, x = random_weights(AddingBlock(batch)), torch.randn(batch, TOKENS, SIZE)
    expected = block(Residual(x)).added()
    fuse(monkeypatch)
    result = block(Residual(x))
    assert result.x is x
    assert result.update is None
    torch.testing.assert_close(x, expected)
    assert kernels.calls == {"add_gated": batch}


def test_a_step_cache_with_updates_in_place_gives_equal_results(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, x = [random_weights(AddingBlock(1)) for _ in range(3)], torch.randn(1, TOKENS, SIZE)
    expected = run_blocks(Residual(x), blocks, None).added()
    fuse(monkeypatch)
    cache = StepCache()
    computed = run_blocks(Residual(x), blocks, CacheUse(cache, probe=False))
    torch.testing.assert_close(computed.added(), expected)
    reused = run_blocks(Residual(x), blocks, CacheUse(cache, probe=True))
    torch.testing.assert_close(reused.added(), expected)
    assert cache.change() == 0
    assert kernels.calls == {"add_gated": 3 + 1}


def test_fused_self_attention_equals_unfused_self_attention(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = random_weights(SelfAttention(SIZE, HEAD)), torch.randn(2, TOKENS, SIZE)
    assert isinstance(attention, SelfAttention)
    rotation = rotary_embedding(torch.arange(TOKENS)[:, None], (HEAD,))
    expected = attention.finish(attention.start(x, rotation))
    fuse(monkeypatch)
    torch.testing.assert_close(attention.finish(attention.start(x, rotation)), expected)
    assert kernels.calls == {"normed_heads_into": len(x)}


@pytest.mark.parametrize(
    "make", [partial(SelfAttention, SIZE, HEAD, SIZE), partial(SelfAttention, SIZE, 64)], ids=["all heads", "narrow"]
)
def test_norms_of_another_form_are_not_fused(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, make: partial[SelfAttention]
) -> None:
    attention = random_weights(make())
    assert isinstance(attention, SelfAttention)
    fuse(monkeypatch)
    rotation = rotary_embedding(torch.arange(TOKENS)[:, None], (attention.head_size,))
    attention.finish(attention.start(torch.randn(1, TOKENS, SIZE), rotation))
    assert not kernels.calls


def test_interleaved_angles_are_cos_and_sin_of_each_pair() -> None:
    rotation = rotary_embedding(torch.arange(TOKENS)[:, None], (HEAD,))
    x = torch.randn(1, TOKENS, 1, HEAD)
    pairs = torch.view_as_complex(x.view(1, TOKENS, 1, -1, 2))
    angles = torch.view_as_complex(rotation.interleaved.view(TOKENS, -1, 2))
    rotated = torch.view_as_real(pairs * angles[None, :, None]).flatten(-2)
    torch.testing.assert_close(rotated, apply_rotary(x, rotation))


def test_on_a_cpu_nothing_is_fused() -> None:
    x = torch.zeros(4096, 16, dtype=torch.bfloat16)
    assert not quack_gemm.can_fuse(x, x[:16], torch.zeros_like(x))


@pytest.mark.parametrize(("size", "expected"), [(1536, True), (8960, False)])
def test_an_update_is_fused_only_for_a_small_inner_dimension(
    monkeypatch: pytest.MonkeyPatch, size: int, expected: bool
) -> None:
    monkeypatch.setattr(quack_gemm, "can_fuse", lambda *_: True)
    x, weight, out = (torch.empty(shape, device="meta") for shape in ((32760, size), (1536, size), (32760, 1536)))
    assert quack_gemm.can_add(x, weight, out) is expected
