"""Joint attention of text and image, and the blocks of DiTs with separate text weights.

Parameter names are those of Diffusers' checkpoints.

Shapes: B batch, S tokens of all segments (text first), D hidden size, K head size. One tensor holds all segments: the
GEMM of a segment writes the segment's tokens of the output tensor, so that no concatenation is needed.
"""

# ruff: noqa: N803, N806  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from models.kernels.qk_norm_rotate import AnyRotation
from models.layers.attention import SelfAttention
from models.layers.linear import JoinedLinear, Linear, only_linear, project
from models.layers.norms import LayerNormScaleShift, Residual, RMSNorm
from models.layers.qk_norm import QKNormModules
from models.rotation import Rotation
from models.token_segments import SegmentVectors, TokenSegments


class JointAttention(SelfAttention):
    """Joint attention over text and image tokens, with separate projections for the text."""

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
        """Join the image projections into one GEMM, and the text projections into another."""
        super().join_weights()
        self.added = JoinedLinear(self._added)

    def joint(self, x_BSD: Tensor, rotation: Rotation, segments: TokenSegments) -> Tensor:
        """Projected attention output (B, S, D) of all tokens (B, S, D); the first segment is the text."""
        attended = self(x_BSD, rotation, segments)
        result = x_BSD.new_empty(x_BSD.shape)
        text, image = _text_and_rest(segments)
        self.to_add_out.into(attended[:, text], result[:, text])
        only_linear(self.to_out).into(attended[:, image], result[:, image])
        return result

    @property
    def _added(self) -> tuple[Linear, ...]:
        return self.add_q_proj, self.add_k_proj, self.add_v_proj

    def _project(self, x_BSD: Tensor, out: Tensor, segments: TokenSegments | None, which: slice) -> None:
        text, image = _text_and_rest(segments)
        project(x_BSD[:, text], out[:, text], self.added, self._added, which)
        super()._project(x_BSD[:, image], out[:, image], None, which)

    def _project_normed(
        self, x_BSD: Tensor, out: Tensor, rotation: AnyRotation, segments: TokenSegments | None, which: slice
    ) -> None:
        text, image = _text_and_rest(segments)
        if not isinstance(rotation, Rotation) or not self._can_fuse(x_BSD[:, image], out[:, image]):
            super()._project_normed(x_BSD, out, rotation, segments, which)
            return
        self._write_normed(x_BSD[:, image], out[:, image], rotation.interleaved[image], which)
        if text.stop:
            project(x_BSD[:, text], out[:, text], self.added, self._added, which)
            self._normalize(out[:, text], rotation.of(text), TokenSegments((text.stop,)), which)

    def _norms(self) -> QKNormModules:
        return replace(super()._norms(), first=(self.norm_added_q, self.norm_added_k))


def _text_and_rest(segments: TokenSegments | None) -> tuple[slice, slice]:
    """Slices of the first segment, which is the text, and of all other segments."""
    assert segments is not None, "joint attention needs the length of the text"
    return slice(0, segments.lengths[0]), slice(segments.lengths[0], None)


ImageModulation = tuple[Tensor, ...]
"""Modulation (B, D) of the image tokens, optionally followed by the modulation of reference images."""


class Modulation(NamedTuple):
    """Shift, scale and gate of one half of a block, computed from the timestep: (B, D) for each segment."""

    shift: SegmentVectors
    scale: SegmentVectors
    gate: SegmentVectors


class BlockFeedForward(Protocol):
    """A feed-forward that writes its result into a given tensor."""

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the result (B, tokens, D) of x (B, tokens, D) into `out`."""


def block_modulations(segments: TokenSegments, modulations: Iterator[ImageModulation]) -> tuple[Modulation, Modulation]:
    """Take the next twelve of `modulations`, and return the modulations of attention and of feed-forwards.

    The first six are for the image, the last six for the text. Only the first tensor of a text modulation is used.
    """
    image, text = (list(islice(modulations, 6)) for _ in range(2))
    vectors = [segments.vectors(of_text[0], *of_image) for of_text, of_image in zip(text, image, strict=True)]
    return Modulation(*vectors[:3]), Modulation(*vectors[3:])


def joint_block(
    residual: Residual,
    norm: LayerNormScaleShift,
    attn: JointAttention,
    feed_forwards: tuple[BlockFeedForward, BlockFeedForward],
    halves: tuple[Modulation, Modulation],
    rotation: Rotation,
    segments: TokenSegments,
) -> Residual:
    """Joint attention, then a feed-forward for the text and one for the image. Both halves are modulated and gated."""
    before, after = halves
    x_BSD, normed = norm.after(residual, before.scale, before.shift)
    residual = Residual(x_BSD, attn.joint(normed, rotation, segments), before.gate)
    x_BSD, normed = norm.after(residual, after.scale, after.shift)
    ff_out = normed.new_empty(normed.shape)
    for rows, feed_forward in zip(_text_and_rest(segments), feed_forwards, strict=True):
        feed_forward.into(normed[:, rows], ff_out[:, rows])
    return Residual(x_BSD, ff_out, after.gate)
