"""Attention and blocks of DiTs with a text and an image stream. Parameter names are those of Diffusers' checkpoints.

Shapes: B batch, T text tokens, S tokens of both streams (text first), D hidden size, K head size. The two streams are
kept in one tensor: each has weights of its own, and products write into their part of the next tensor.
"""

# ruff: noqa: N803, N806  (the capitals of a tensor's name are its shape)

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from torch import Tensor, nn

from models.layers.attention import Attention, InFlight
from models.layers.feed_forward import FeedForward
from models.layers.linear import JoinedLinear, JoinsWeights, Linear, project
from models.layers.norms import LayerNormScaleShift, Residual, RMSNorm, Streams
from models.layers.qk_norm import QKNorms, apply_qk_norm, split_heads
from models.layers.rotary import Rotation

Started = tuple[InFlight, InFlight, InFlight]
"""Queries, keys and values that attention was started with."""


class StreamAttention(JoinsWeights):
    """Attention over one stream, with normalised queries and keys. The block projects the result."""

    def __init__(self, size: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.to_q = Linear(size, size)
        self.to_k = Linear(size, size)
        self.to_v = Linear(size, size)
        self.norm_q = RMSNorm(head_size)
        self.norm_k = RMSNorm(head_size)
        self.inner = Attention()
        self.joined: JoinedLinear | None = None

    def join_weights(self) -> None:
        """Make one product of the three projections, once the weights are in place."""
        self.joined = JoinedLinear((self.to_q, self.to_k, self.to_v))

    def project(self, x_BSD: Tensor, qkv: Tensor) -> None:
        """Write queries, keys and values side by side into qkv (B, S, 3 * D of this rank)."""
        project(x_BSD, qkv, self.joined, (self.to_q, self.to_k, self.to_v))

    def start(self, x_BSD: Tensor, rotation: Rotation) -> Started:
        """Begin self-attention: whatever is computed before finish() overlaps with what ranks send each other."""
        qkv = x_BSD.new_empty(*x_BSD.shape[:2], 3 * self.to_q.weight.shape[0])
        self.project(x_BSD, qkv)
        return self._start(qkv, rotation)

    def finish(self, started: Started) -> Tensor:
        """(B, S, D of this rank)."""
        attended: Tensor = self.inner.finish(*started)
        return attended.flatten(2)

    def _start(self, qkv: Tensor, rotation: Rotation, boundary: int = 0) -> Started:
        """Normalise and turn queries and keys, in place; values are on their way before that."""
        q, k, v = (split_heads(part, self.head_size) for part in qkv.chunk(3, dim=-1))
        values = self.inner.start_keys(v)
        apply_qk_norm(qkv[..., : 2 * qkv.shape[-1] // 3], self._norms(), rotation, boundary)
        keys = self.inner.start_keys(k)
        return self.inner.start_queries(q), keys, values

    def _norms(self) -> QKNorms:
        norms = (self.norm_q, self.norm_k)
        return QKNorms(text=norms, image=norms, head_size=self.head_size)


class JointAttention(StreamAttention):
    """Attention over both streams at once, each with projections of its own."""

    def __init__(self, size: int, head_size: int) -> None:
        super().__init__(size, head_size)
        self.add_q_proj = Linear(size, size)
        self.add_k_proj = Linear(size, size)
        self.add_v_proj = Linear(size, size)
        self.norm_added_q = RMSNorm(head_size)
        self.norm_added_k = RMSNorm(head_size)
        self.to_out = nn.ModuleList([Linear(size, size)])
        self.to_add_out = Linear(size, size)
        self.added: JoinedLinear | None = None

    def join_weights(self) -> None:
        """The same for both streams."""
        super().join_weights()
        self.added = JoinedLinear((self.add_q_proj, self.add_k_proj, self.add_v_proj))

    def joint(self, x_BSD: Tensor, rotation: Rotation, boundary: int) -> Tensor:
        """What both streams (B, S, D) took from both; the first `boundary` tokens are text."""
        qkv = x_BSD.new_empty(*x_BSD.shape[:2], 3 * self.to_q.weight.shape[0])
        added = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        project(x_BSD[:, :boundary], qkv[:, :boundary], self.added, added)
        self.project(x_BSD[:, boundary:], qkv[:, boundary:])
        attended = self.finish(self._start(qkv, rotation, boundary))
        result = x_BSD.new_empty(x_BSD.shape)
        self.to_add_out.into(attended[:, :boundary], result[:, :boundary])
        out = self.to_out[0]
        assert isinstance(out, Linear)
        out.into(attended[:, boundary:], result[:, boundary:])
        return result

    def _norms(self) -> QKNorms:
        return QKNorms(
            text=(self.norm_added_q, self.norm_added_k), image=(self.norm_q, self.norm_k), head_size=self.head_size
        )


class Modulation(NamedTuple):
    """What the timestep makes of one half of a block: (B, D) for each stream."""

    shift: Streams
    scale: Streams
    gate: Streams


def block_modulations(parts: Iterator[Tensor]) -> tuple[Modulation, Modulation]:
    """Those of a block's attention and of its feed-forwards: the next six of the picture, then six of the text."""
    image, text = (list(islice(parts, 6)) for _ in range(2))
    vectors = [Streams(*pair) for pair in zip(text, image, strict=True)]
    return Modulation(*vectors[:3]), Modulation(*vectors[3:])


def joint_block(
    residual: Residual,
    norm: LayerNormScaleShift,
    attn: JointAttention,
    feed_forwards: tuple[FeedForward, FeedForward],
    modulations: tuple[Modulation, Modulation],
    rotation: Rotation,
    boundary: int,
) -> Residual:
    """Joint attention, then a feed-forward for each stream (text first), both modulated and gated."""
    before, after = modulations
    x_BSD, normed = norm.after(residual, before.scale, before.shift, boundary)
    residual = Residual(x_BSD, attn.joint(normed, rotation, boundary), before.gate)
    x_BSD, normed = norm.after(residual, after.scale, after.shift, boundary)
    fed = normed.new_empty(normed.shape)
    for rows, feed_forward in zip((slice(0, boundary), slice(boundary, None)), feed_forwards, strict=True):
        feed_forward.into(normed[:, rows], fed[:, rows])
    return Residual(x_BSD, fed, after.gate)
