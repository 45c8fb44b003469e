"""Blocks of the LTX-2 DiT: two modalities of tokens, video and audio, that attend to text and to each other.

Shapes: B batch, S tokens of a modality, T text tokens, D a modality's hidden size, M modulations. Modalities are in the
model's type; norms, modulation and gates compute in float32. Parameter names are the checkpoint's.
"""

# ruff: noqa: N803, N806  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from configs.models.dits.ltx2 import LTX2ModalityConfig, LTX2TransformerConfig
from models.kernels.attention import attention
from models.kernels.qk_norm_rotate import split_heads
from models.layers.attention import Attention
from models.layers.feed_forward import FeedForward
from models.layers.head_rotary import SelectHeads
from models.layers.linear import Linear, only_linear
from models.layers.norms import Residual, RMSNorm, RMSNormScaleShift
from models.layers.qk_norm import QKNormModules, apply_qk_norm
from models.layers.step_cache import CacheUse
from models.rotation import HeadRotation
from models.token_segments import SegmentVectors, TokenSegments, vectors_of_rows

EXCHANGE = 4
"""Modulations of attention between the modalities: scale and shift towards video, scale and shift towards audio."""


class Modalities(NamedTuple):
    """Video and audio tokens, (B, S, D) each, with updates that are still to be added."""

    video: Residual
    audio: Residual


class SegmentRows(NamedTuple):
    """Modulations (B, M, D), float32, of a first frame's tokens where they differ, and of the others."""

    first: Tensor | None
    rest: Tensor
    segments: TokenSegments | None = None

    def of(self, which: slice) -> SegmentRows:
        """Some of the modulations."""
        first = None if self.first is None else self.first[:, which]
        return SegmentRows(first, self.rest[:, which], self.segments)

    def plus(self, table_MD: Tensor) -> list[SegmentVectors]:
        """The sums with a block's table, one for each modulation."""
        table = table_MD.float()
        first = None if self.first is None else self.first + table
        return vectors_of_rows(self.segments, first, self.rest + table)


class StepRows(NamedTuple):
    """Modulations of a modality at a step.

    Those of its blocks, of attention between the modalities, of the gate of its result, of the output, and of the text,
    which may be none.
    """

    blocks: SegmentRows
    exchange: SegmentRows
    gate: SegmentRows
    output: SegmentRows
    text: SegmentRows

    @classmethod
    def split(cls, rows: SegmentRows, blocks: int) -> StepRows:
        """From all rows, in this order; `blocks` of them are those of blocks."""
        ends = (0, blocks, blocks + EXCHANGE, blocks + EXCHANGE + 1, blocks + EXCHANGE + 2, rows.rest.shape[1])
        return cls(*(rows.of(slice(start, end)) for start, end in pairwise(ends)))


@dataclass(frozen=True)
class ModalityInputs:
    """What blocks read beside a modality's tokens: modulations, the text (B, T, D), and rotations.

    `rotation` is of positions for self-attention, `exchange_rotation` of seconds alone.
    """

    rows: StepRows
    text: Tensor
    text_mask: Tensor | None
    rotation: HeadRotation
    exchange_rotation: HeadRotation


class LTX2Attention(nn.Module):
    """Attention to other tokens or to a modality's own; queries and keys are normalised over all heads together."""

    def __init__(self, sizes: tuple[int, int], modality: LTX2ModalityConfig, eps: float, *, is_gated: bool) -> None:
        super().__init__()
        size, context_size = sizes
        inner_size = modality.hidden_size
        self.head_size = modality.head_size
        self.to_q = Linear(size, inner_size)
        self.to_k = Linear(context_size, inner_size)
        self.to_v = Linear(context_size, inner_size)
        self.to_out = nn.ModuleList([Linear(inner_size, size)])
        self.norm_q = RMSNorm(inner_size, eps)
        self.norm_k = RMSNorm(inner_size, eps)
        self.to_gate_logits = Linear(size, modality.num_heads) if is_gated else None
        self.select_heads = SelectHeads()
        self.inner = Attention()

    def forward(
        self,
        x_BSD: Tensor,
        context: Tensor | None = None,
        rotation: HeadRotation | None = None,
        context_rotation: HeadRotation | None = None,
        mask: Tensor | None = None,
        *,
        is_skipped: bool = False,
    ) -> Tensor:
        """The attention output before the output projection; a skipped one is the values themselves.

        `context` None: tokens attend to each other. `mask` is added to the scores.
        """
        keys_from, keys_rotation = (x_BSD, rotation) if context is None else (context, context_rotation)
        values = split_heads(self.to_v(keys_from), self.head_size)
        if is_skipped:
            return self._gated(x_BSD, values)
        q = self._normed(self.to_q(x_BSD), self.norm_q, rotation)
        k = self._normed(self.to_k(keys_from), self.norm_k, keys_rotation)
        attended = self.inner(q, k, values) if mask is None else attention(q, k, values, mask)
        return self._gated(x_BSD, attended)

    def _normed(self, x: Tensor, norm: RMSNorm, rotation: HeadRotation | None) -> Tensor:
        """Normalise queries or keys (B, S, heads * K) in place and rotate them; as heads (B, S, heads, K)."""
        if rotation is not None:
            rotation = HeadRotation(
                self.select_heads(rotation.cos), self.select_heads(rotation.sin), rotation.is_neox_style
            )
        apply_qk_norm(x, QKNormModules((norm,), self.head_size), rotation)
        return split_heads(x, self.head_size)

    def _gated(self, x_BSD: Tensor, attended: Tensor) -> Tensor:
        """Heads side by side, each times its gate, which is 1 at a logit of 0."""
        if self.to_gate_logits is None:
            return attended.flatten(2)
        gates: Tensor = 2.0 * torch.sigmoid(self.to_gate_logits(x_BSD))
        return (attended * gates[..., None]).flatten(2)


class _Half(NamedTuple):
    """A block's modules of one modality. `attn` is to the modality itself, `text_attn` to the text."""

    attn: LTX2Attention
    text_attn: LTX2Attention
    norm: RMSNormScaleShift
    ff: FeedForward
    table: nn.Parameter
    text_table: nn.Parameter | None


class LTX2VideoTransformerBlock(nn.Module):
    """Self-attention, attention to the text, exchange between the modalities, feed-forward."""

    def __init__(self, config: LTX2TransformerConfig) -> None:
        super().__init__()
        video, audio, eps = config.video, config.audio, config.eps
        sizes = (video.hidden_size, audio.hidden_size)
        self.video_norm = RMSNormScaleShift(video.hidden_size, eps)
        self.audio_norm = RMSNormScaleShift(audio.hidden_size, eps)
        self.attn1, self.audio_attn1, self.attn2, self.audio_attn2 = (
            LTX2Attention((each.hidden_size, each.hidden_size), each, eps, is_gated=each.is_gated)
            for each in (video, audio, video, audio)
        )
        # Both have the heads of audio.
        self.audio_to_video_attn = LTX2Attention(sizes, audio, eps, is_gated=video.is_gated)
        self.video_to_audio_attn = LTX2Attention(sizes[::-1], audio, eps, is_gated=audio.is_gated)
        self.ff, self.audio_ff = FeedForward(video.hidden_size), FeedForward(audio.hidden_size)
        self.scale_shift_table = nn.Parameter(torch.zeros(block_rows(video), video.hidden_size))
        self.audio_scale_shift_table = nn.Parameter(torch.zeros(block_rows(audio), audio.hidden_size))
        texts = [nn.Parameter(torch.zeros(2, size)) if config.modulates_text else None for size in sizes]
        self.prompt_scale_shift_table, self.audio_prompt_scale_shift_table = texts
        self.video_a2v_cross_attn_scale_shift_table = nn.Parameter(torch.zeros(EXCHANGE + 1, video.hidden_size))
        self.audio_a2v_cross_attn_scale_shift_table = nn.Parameter(torch.zeros(EXCHANGE + 1, audio.hidden_size))

    def forward(
        self,
        modalities: Modalities,
        video: ModalityInputs,
        audio: ModalityInputs,
        *,
        is_skipped: bool,
        is_isolated: bool,
    ) -> Modalities:
        """The next tokens. `is_skipped`: without self-attention; `is_isolated`: without the exchange."""
        halves = ((self._video_half, video), (self._audio_half, audio))
        attended = Modalities(
            *(
                _attend(half, residual, inputs, is_skipped=is_skipped)
                for (half, inputs), residual in zip(halves, modalities, strict=True)
            )
        )
        if not is_isolated:
            attended = self._exchange(attended, video, audio)
        return Modalities(*(_feed(half, x, inputs) for (half, inputs), x in zip(halves, attended, strict=True)))

    def _exchange(self, modalities: Modalities, video: ModalityInputs, audio: ModalityInputs) -> Modalities:
        """Each modality attends to the other as it was before."""
        tables = (self.video_a2v_cross_attn_scale_shift_table, self.audio_a2v_cross_attn_scale_shift_table)
        norms = (self.video_norm, self.audio_norm)
        added, to_video, to_audio, gates = [], [], [], []
        for residual, inputs, table, norm in zip(modalities, (video, audio), tables, norms, strict=True):
            video_scale, video_shift, audio_scale, audio_shift = inputs.rows.exchange.plus(table[:EXCHANGE])
            x_BSD, normed = norm.after(residual, video_scale, video_shift)
            added.append(x_BSD)
            to_video.append(normed)
            to_audio.append(norm(x_BSD, audio_scale, audio_shift))
            gates += inputs.rows.gate.plus(table[EXCHANGE:])
        rotations = (video.exchange_rotation, audio.exchange_rotation)
        heard = self.audio_to_video_attn(*to_video, *rotations)
        seen = self.video_to_audio_attn(*to_audio[::-1], *rotations[::-1])
        to_outs = [only_linear(attn.to_out) for attn in (self.audio_to_video_attn, self.video_to_audio_attn)]
        return Modalities(
            to_outs[0].add_gated(added[0], heard, gates[0]),
            to_outs[1].add_gated(added[1], seen, gates[1]),
        )

    @property
    def _video_half(self) -> _Half:
        table, text_table = self.scale_shift_table, self.prompt_scale_shift_table
        return _Half(self.attn1, self.attn2, self.video_norm, self.ff, table, text_table)

    @property
    def _audio_half(self) -> _Half:
        table, text_table = self.audio_scale_shift_table, self.audio_prompt_scale_shift_table
        return _Half(self.audio_attn1, self.audio_attn2, self.audio_norm, self.audio_ff, table, text_table)


def block_rows(modality: LTX2ModalityConfig) -> int:
    """Modulations of a block: shift, scale and gate of self-attention and of feed-forward, and of text attention."""
    return 9 if modality.modulates_text else 6


def _attend(half: _Half, residual: Residual, inputs: ModalityInputs, *, is_skipped: bool) -> Residual:
    """Self-attention, then attention to the text."""
    shift, scale, gate, *rest = inputs.rows.blocks.plus(half.table)
    x_BSD, normed = half.norm.after(residual, scale, shift)
    attended = half.attn(normed, rotation=inputs.rotation, is_skipped=is_skipped)
    residual = only_linear(half.attn.to_out).add_gated(x_BSD, attended, gate)
    text_shift, text_scale, text_gate = rest[3:] or _unmodulated(gate.last)
    x_BSD, normed = half.norm.after(residual, text_scale, text_shift)
    attended = half.text_attn(normed, _modulated_text(half, inputs), mask=inputs.text_mask)
    return only_linear(half.text_attn.to_out).add_gated(x_BSD, attended, text_gate)


def _unmodulated(like_BD: Tensor) -> list[SegmentVectors]:
    """Shift, scale and gate that change nothing."""
    zeros = SegmentVectors.same(torch.zeros_like(like_BD))
    return [zeros, zeros, SegmentVectors.same(torch.ones_like(like_BD))]


def _modulated_text(half: _Half, inputs: ModalityInputs) -> Tensor:
    if half.text_table is None:
        return inputs.text
    shift, scale = inputs.rows.text.plus(half.text_table)
    modulated = inputs.text.float() * (1 + scale.last[:, None]) + shift.last[:, None]
    return modulated.to(inputs.text.dtype)


def _feed(half: _Half, residual: Residual, inputs: ModalityInputs) -> Residual:
    """The feed-forward half."""
    shift, scale, gate = inputs.rows.blocks.plus(half.table)[3:6]
    x_BSD, normed = half.norm.after(residual, scale, shift)
    fed = normed.new_empty(normed.shape)
    half.ff.into(normed, fed)
    return Residual(x_BSD, fed, gate)


def run_both_modalities(
    modalities: Modalities, blocks: Sequence[Callable[[Modalities], Modalities]], use: CacheUse | None
) -> Modalities:
    """Both modalities after all blocks. With a cache, what is computed is the same to the bit, and no update is left.

    The cache holds both modalities' values side by side, (B, video tokens x D + audio tokens x D).
    """
    if use is None:
        for block in blocks:
            modalities = block(modalities)
        return modalities
    first, *others = blocks
    # Blocks may change what they are given.
    begun = _added(first(Modalities(*(residual._replace(x=residual.x.clone()) for residual in modalities))))
    start = _joined(begun)
    own = start - _joined(modalities)
    if use.probe:
        return _parted(start + use.cache.reuse(own), modalities)
    for block in others:
        begun = block(begun)
    end = _added(begun)
    use.cache.store(own, _joined(end) - start)
    return end


def _added(modalities: Modalities) -> Modalities:
    """The modalities with their updates."""
    return Modalities(Residual(modalities.video.added()), Residual(modalities.audio.added()))


def _joined(modalities: Modalities) -> Tensor:
    """A new tensor with the values of both modalities, which have no updates."""
    return torch.cat([each.x.flatten(1) for each in modalities], dim=1)


def _parted(joined: Tensor, like: Modalities) -> Modalities:
    """The modalities of joined values, in the shapes of others."""
    video = like.video.x[0].numel()
    parts = (joined[:, :video], joined[:, video:])
    return Modalities(*(Residual(part.reshape(each.x.shape)) for part, each in zip(parts, like, strict=True)))
