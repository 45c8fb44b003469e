"""Self-attention with keys and values written where other ranks' are gathered, against attention where they are."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from models.layers.attention import Attention, KeyValueCache, KeyValues
from models.layers.joint_attention import JointAttention
from models.layers.rotary import rotary_embedding
from models.layers.self_attention import SelfAttention
from models.parallel.mesh import Axis
from models.parallel.peer_gather import Gathered, PeerGather
from models.parallel.peer_memory import CopyStreams, PeerMemory
from models.token_segments import TokenSegments

CPU = torch.device("cpu")
SIZE, HEAD, TOKENS, BOUNDARY = 32, 8, 6, 2


class NoStreams:
    """Of a rank that has no peers: all happens at once."""

    side = current = None

    def await_stream(self, waiting: object, other: object) -> None:
        """Nothing is late."""


class GatheringAttention(Attention):
    """A parallel form that gathers from one rank."""

    travels = True

    def __init__(self) -> None:
        super().__init__()
        self.gather = PeerGather(Axis(), CPU, cast("CopyStreams", NoStreams()), self._allocate)

    @staticmethod
    def _allocate(axis: Axis, device: torch.device, size: int) -> PeerMemory:
        del axis
        own = torch.zeros(size, dtype=torch.uint8, device=device)
        return PeerMemory(own, [own.data_ptr()])

    def key_values(self, k: Tensor, v: Tensor) -> KeyValues:
        """Those of all ranks, which are this one's."""
        assert k.shape == v.shape
        batch, tokens, heads, size = k.shape
        return self.new_key_values(k, (batch, tokens, 2, heads, size))

    def new_key_values(self, like: Tensor, shape: tuple[int, ...]) -> KeyValues:
        """Room among those of all ranks."""
        return self.gather.key_values(shape, like.dtype, [shape[1]])

    def finish(
        self, q: Tensor, sent: KeyValues, out: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Attend to them."""
        assert isinstance(sent, Gathered)
        assert cache is None
        return sent.attend(q, out)


def random_weights(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("keys_first", [False, True], ids=["one-product", "keys-first"])
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_one_stream(keys_first: bool, joined: bool, batch: int) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(SIZE, HEAD)
    random_weights(attention)
    if joined:
        attention.join_weights()
    x, rotation = torch.randn(batch, TOKENS, SIZE), rotary_embedding(torch.arange(TOKENS)[:, None], (HEAD,))
    expected = attention.finish(attention.start(x, rotation))
    attention.inner = GatheringAttention()
    torch.testing.assert_close(attention.finish(attention.start(x, rotation, keys_first=keys_first)), expected)
    wide = torch.zeros(batch, TOKENS, SIZE + 4)
    out = wide[..., 4:]
    assert attention.finish(attention.start(x, rotation, keys_first=keys_first), out) is out
    torch.testing.assert_close(out, expected)
    assert not wide[..., :4].any()


@torch.inference_mode()
def test_two_streams() -> None:
    torch.manual_seed(0)
    attention = JointAttention(SIZE, HEAD)
    random_weights(attention)
    attention.join_weights()
    x, rotation = torch.randn(2, TOKENS, SIZE), rotary_embedding(torch.arange(TOKENS)[:, None], (HEAD,))
    expected = attention.joint(x, rotation, TokenSegments((BOUNDARY, TOKENS - BOUNDARY)))
    attention.inner = GatheringAttention()
    torch.testing.assert_close(attention.joint(x, rotation, TokenSegments((BOUNDARY, TOKENS - BOUNDARY))), expected)


@torch.inference_mode()
def test_a_call_sends_what_it_is_given() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, TOKENS, 4, HEAD).unbind()
    torch.testing.assert_close(GatheringAttention()(q, k, v), Attention()(q, k, v))
