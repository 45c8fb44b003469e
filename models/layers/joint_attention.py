"""Joint attention, and blocks of DiTs with a text and an image stream. Names are those of Diffusers' checkpoints.

Shapes: B batch, T text tokens, S tokens of both streams (text first), D hidden size, K head size. The two streams are
kept in one tensor: each has weights of its own, and products write into their part of the next tensor.
"""

# ruff: noqa: N803, N806  (the capitals of a tensor's name are its shape)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from models.layers.head_rotary import HeadRotation
from models.layers.linear import JoinedLinear, Linear, only_linear, project
from models.layers.norms import LayerNormScaleShift, Residual, RMSNorm, SegmentVectors
from models.layers.qk_norm import QKNorms
from models.layers.rotary import Rotation
from models.layers.self_attention import SelfAttention


class JointAttention(SelfAttention):
    """Attention over both streams at once, each with projections of its own."""

    def __init__(self, size: int, head_size: int, *, has_bias: bool = True) -> None:
        super().__init__(size, head_size, has_bias=has_bias)
        self.add_q_proj = Linear(size, size, has_bias=has_bias)
        self.add_k_proj = Linear(size, size, has_bias=has_bias)
        self.add_v_proj = Linear(size, size, has_bias=has_bias)
        self.norm_added_q = RMSNorm(head_size)
        self.norm_added_k = RMSNorm(head_size)
        self.to_out = nn.ModuleList([Linear(size, size, has_bias=has_bias)])
        self.to_add_out = Linear(size, size, has_bias=has_bias)
        self.added: JoinedLinear | None = None

    def join_weights(self) -> None:
        """The same for both streams."""
        super().join_weights()
        self.added = JoinedLinear(self._added)

    def joint(self, x_BSD: Tensor, rotation: Rotation, boundary: int) -> Tensor:
        """What both streams (B, S, D) took from both; the first `boundary` tokens are text."""
        attended = self.finish(self.start(x_BSD, rotation, boundary, keys_first=True))
        result = x_BSD.new_empty(x_BSD.shape)
        self.to_add_out.into(attended[:, :boundary], result[:, :boundary])
        only_linear(self.to_out).into(attended[:, boundary:], result[:, boundary:])
        return result

    @property
    def _added(self) -> tuple[Linear, ...]:
        return self.add_q_proj, self.add_k_proj, self.add_v_proj

    def _project(self, x_BSD: Tensor, out: Tensor, boundary: int, which: slice) -> None:
        project(x_BSD[:, :boundary], out[:, :boundary], self.added, self._added, which)
        super()._project(x_BSD[:, boundary:], out[:, boundary:], 0, which)

    def _project_normed(
        self, x_BSD: Tensor, out: Tensor, rotation: Rotation | HeadRotation, boundary: int, which: slice
    ) -> None:
        image = slice(boundary, None)
        if not isinstance(rotation, Rotation) or not self._can_fuse(x_BSD[:, image], out[:, image]):
            super()._project_normed(x_BSD, out, rotation, boundary, which)
            return
        self._write_normed(x_BSD[:, image], out[:, image], rotation.turns[image], which)
        if boundary:
            text = slice(0, boundary)
            project(x_BSD[:, text], out[:, text], self.added, self._added, which)
            self._normalise(out[:, text], rotation.of(text), boundary, which)

    def _norms(self) -> QKNorms:
        return replace(super()._norms(), text=(self.norm_added_q, self.norm_added_k))


class Modulation(NamedTuple):
    """What the timestep makes of one half of a block: (B, D) for each stream."""

    shift: SegmentVectors
    scale: SegmentVectors
    gate: SegmentVectors


class LastSegment(NamedTuple):
    """The last image tokens, if they have a timestep of their own: how many, and their modulations in order."""

    tokens: int
    parts: Iterator[Tensor]


class WritesInto(Protocol):
    """A feed-forward that writes its result into a part of a tensor."""

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the result (B, tokens, D) of x (B, tokens, D) into `out`."""


def block_modulations(parts: Iterator[Tensor], last: LastSegment | None = None) -> tuple[Modulation, Modulation]:
    """Those of a block's attention and of its feed-forwards: the next six of the picture, then six of the text."""
    image, text = (list(islice(parts, 6)) for _ in range(2))
    vectors = [SegmentVectors(*pair) for pair in zip(text, image, strict=True)]
    if last is not None:
        own, _ = (list(islice(last.parts, 6)) for _ in range(2))  # no text token has its timestep
        vectors = [SegmentVectors(*pair[:2], each, last.tokens) for pair, each in zip(vectors, own, strict=True)]
    return Modulation(*vectors[:3]), Modulation(*vectors[3:])


def joint_block(
    residual: Residual,
    norm: LayerNormScaleShift,
    attn: JointAttention,
    feed_forwards: tuple[WritesInto, WritesInto],
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
