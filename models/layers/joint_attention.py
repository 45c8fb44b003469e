"""Joint attention, and blocks of DiTs with weights of their own for text. Names are those of Diffusers' checkpoints.

Shapes: B batch, S tokens of all segments (text first), D hidden size, K head size. All segments are in one tensor: GEMM
writes the text's part and the other part of the next tensor.
"""

# ruff: noqa: N803, N806  (the capitals of a tensor's name are its shape)

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
from models.layers.qk_norm import HeadNorms
from models.rotation import Rotation
from models.token_segments import SegmentVectors, TokenSegments


class JointAttention(SelfAttention):
    """Attention over text and image at once, with projections of their own."""

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
        """The same for both projections."""
        super().join_weights()
        self.added = JoinedLinear(self._added)

    def joint(self, x_BSD: Tensor, rotation: Rotation, segments: TokenSegments) -> Tensor:
        """What all tokens (B, S, D) took from all; the first segment is the text."""
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
            self._normalise(out[:, text], rotation.of(text), TokenSegments((text.stop,)), which)

    def _norms(self) -> HeadNorms:
        return replace(super()._norms(), first=(self.norm_added_q, self.norm_added_k))


def _text_and_rest(segments: TokenSegments | None) -> tuple[slice, slice]:
    """The tokens of the text, which is the first segment, and all others."""
    assert segments is not None, "joint attention needs the length of the text"
    return slice(0, segments.lengths[0]), slice(segments.lengths[0], None)


class Modulation(NamedTuple):
    """Shift, scale and gate of one half of a block, which the timestep decides: (B, D) for each segment."""

    shift: SegmentVectors
    scale: SegmentVectors
    gate: SegmentVectors


class WritesInto(Protocol):
    """A feed-forward that writes its result into a part of a tensor."""

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the result (B, tokens, D) of x (B, tokens, D) into `out`."""


def block_modulations(
    segments: TokenSegments, image: Iterator[Tensor], last: Iterator[Tensor] | None = None
) -> tuple[Modulation, Modulation]:
    """Modulations of a block's attention and of its feed-forwards.

    `image` yields the next six of the image, then six of the text. `last` yields as many for the last of three
    segments, which has a timestep of its own; its text modulations are unused.
    """
    own, text = (list(islice(image, 6)) for _ in range(2))
    if last is None:
        vectors = [segments.vectors(*pair) for pair in zip(text, own, strict=True)]
    else:
        of_last, _ = (list(islice(last, 6)) for _ in range(2))
        vectors = [segments.vectors(*each) for each in zip(text, own, of_last, strict=True)]
    return Modulation(*vectors[:3]), Modulation(*vectors[3:])


def joint_block(
    residual: Residual,
    norm: LayerNormScaleShift,
    attn: JointAttention,
    feed_forwards: tuple[WritesInto, WritesInto],
    modulations: tuple[Modulation, Modulation],
    rotation: Rotation,
    segments: TokenSegments,
) -> Residual:
    """Joint attention, then a feed-forward for the text and one for all others, both modulated and gated."""
    before, after = modulations
    x_BSD, normed = norm.after(residual, before.scale, before.shift)
    residual = Residual(x_BSD, attn.joint(normed, rotation, segments), before.gate)
    x_BSD, normed = norm.after(residual, after.scale, after.shift)
    fed = normed.new_empty(normed.shape)
    for rows, feed_forward in zip(_text_and_rest(segments), feed_forwards, strict=True):
        feed_forward.into(normed[:, rows], fed[:, rows])
    return Residual(x_BSD, fed, after.gate)
