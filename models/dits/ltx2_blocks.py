"""Blocks of the LTX-2 DiT: video and audio tokens, which attend to text and to each other.

"Exchange" is the cross-attention between the two modalities. Shapes: B batch, S tokens of a modality, T text tokens, D
hidden size of a modality, M modulations. Residual streams are in the model's dtype; norms, modulation and gates are
computed in float32. Parameter names are the checkpoint's.
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
"""Number of modulations of the exchange: scale and shift of audio-to-video, then of video-to-audio."""


class Modalities(NamedTuple):
    """Residual streams (B, S, D) of video and audio, with pending updates."""

    video: Residual
    audio: Residual


class SegmentRows(NamedTuple):
    """Modulations (B, M, D), float32. `first` modulates the first frame; None: `rest` modulates all tokens."""

    first: Tensor | None
    rest: Tensor
    segments: TokenSegments | None = None

    def of(self, which: slice) -> SegmentRows:
        """A slice of the M modulations."""
        first = None if self.first is None else self.first[:, which]
        return SegmentRows(first, self.rest[:, which], self.segments)

    def plus(self, table_MD: Tensor) -> list[SegmentVectors]:
        """The modulations plus a learned table, as a list with an entry for each row of the table.

        The table is (M, D), or has several rows if M is 1: the single modulation is then added to each row.
        """
        table = table_MD.float()
        first = None if self.first is None else self.first + table
        return vectors_of_rows(self.segments, first, self.rest + table)


class StepRows(NamedTuple):
    """Modulations of a modality in one step.

    `exchange` modulates the inputs of the exchange and `gate` its result; `output` modulates the output norm. `text` is
    empty in models without text modulation.
    """

    blocks: SegmentRows
    exchange: SegmentRows
    gate: SegmentRows
    output: SegmentRows
    text: SegmentRows

    @classmethod
    def split(cls, rows: SegmentRows, blocks: int) -> StepRows:
        """Split modulations (B, rows, D) into the fields, in order. The first `blocks` rows are the field `blocks`."""
        ends = (0, blocks, blocks + EXCHANGE, blocks + EXCHANGE + 1, blocks + EXCHANGE + 2, rows.rest.shape[1])
        return cls(*(rows.of(slice(start, end)) for start, end in pairwise(ends)))


@dataclass(frozen=True)
class ModalityInputs:
    """Inputs of blocks besides the tokens of a modality: modulations, text (B, T, D), text mask and RoPE.

    `rotation` is RoPE for self-attention, by all position axes; `exchange_rotation` is RoPE by seconds only.
    """

    rows: StepRows
    text: Tensor
    text_mask: Tensor | None
    rotation: HeadRotation
    exchange_rotation: HeadRotation


class LTX2Attention(nn.Module):
    """Self-attention or cross-attention of a modality. Norms of queries and keys are over all heads together.

    `sizes` are the hidden sizes of the tokens and of the context. `modality` determines the heads, and `is_gated`
    whether each head of the output has a gate.
    """

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
        """Attention output without the output projection.

        `context` None: self-attention. `mask` is added to the attention scores. `is_skipped`: return the values instead
        of the attention output.
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
        """Apply norm and RoPE to queries or keys (B, S, heads * K) in place; returns a view (B, S, heads, K)."""
        if rotation is not None:
            cos, sin = self.select_heads(rotation.cos), self.select_heads(rotation.sin)
            rotation = HeadRotation(cos, sin, rotation.is_neox_style)
        apply_qk_norm(x, QKNormModules((norm,), self.head_size), rotation)
        return split_heads(x, self.head_size)

    def _gated(self, x_BSD: Tensor, attended: Tensor) -> Tensor:
        """Multiply heads (B, S, heads, K) by their gates; returns (B, S, heads * K). A gate is 2 * sigmoid(logit)."""
        if self.to_gate_logits is None:
            return attended.flatten(2)
        gates: Tensor = 2.0 * torch.sigmoid(self.to_gate_logits(x_BSD))
        return (attended * gates[..., None]).flatten(2)


class _ModalityModules(NamedTuple):
    """Modules of a block for one modality. `attn` is self-attention, `text_attn` is cross-attention to the text."""

    attn: LTX2Attention
    text_attn: LTX2Attention
    norm: RMSNormScaleShift
    ff: FeedForward
    table: nn.Parameter
    text_table: nn.Parameter | None


class LTX2VideoTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, exchange between the modalities, feed-forward."""

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
        # Both cross-attentions have the audio's number of heads and head size.
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
        """Return both residual streams after the block.

        `is_skipped`: the values replace the output of self-attention. `is_isolated`: without the exchange.
        """
        pairs = ((self._video_modules, video), (self._audio_modules, audio))
        attended = Modalities(
            *(
                _attend(modules, residual, inputs, is_skipped=is_skipped)
                for (modules, inputs), residual in zip(pairs, modalities, strict=True)
            )
        )
        if not is_isolated:
            attended = self._exchange(attended, video, audio)
        zipped = zip(pairs, attended, strict=True)
        return Modalities(*(_feed_forward(modules, residual, inputs) for (modules, inputs), residual in zipped))

    def _exchange(self, modalities: Modalities, video: ModalityInputs, audio: ModalityInputs) -> Modalities:
        """Cross-attention in both directions. Both directions read the tokens from before the exchange."""
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
        video_attended = self.audio_to_video_attn(*to_video, *rotations)
        audio_attended = self.video_to_audio_attn(*to_audio[::-1], *rotations[::-1])
        to_outs = [only_linear(attn.to_out) for attn in (self.audio_to_video_attn, self.video_to_audio_attn)]
        return Modalities(
            to_outs[0].add_gated(added[0], video_attended, gates[0]),
            to_outs[1].add_gated(added[1], audio_attended, gates[1]),
        )

    @property
    def _video_modules(self) -> _ModalityModules:
        table, text_table = self.scale_shift_table, self.prompt_scale_shift_table
        return _ModalityModules(self.attn1, self.attn2, self.video_norm, self.ff, table, text_table)

    @property
    def _audio_modules(self) -> _ModalityModules:
        table, text_table = self.audio_scale_shift_table, self.audio_prompt_scale_shift_table
        return _ModalityModules(self.audio_attn1, self.audio_attn2, self.audio_norm, self.audio_ff, table, text_table)


def block_rows(modality: LTX2ModalityConfig) -> int:
    """Number of a block's modulations.

    They are shift, scale and gate of self-attention, of the feed-forward and, with text modulation, of text attention.
    """
    return 9 if modality.modulates_text else 6


def _attend(modules: _ModalityModules, residual: Residual, inputs: ModalityInputs, *, is_skipped: bool) -> Residual:
    """Self-attention, then cross-attention to the text."""
    shift, scale, gate, *rest = inputs.rows.blocks.plus(modules.table)
    x_BSD, normed = modules.norm.after(residual, scale, shift)
    attended = modules.attn(normed, rotation=inputs.rotation, is_skipped=is_skipped)
    residual = only_linear(modules.attn.to_out).add_gated(x_BSD, attended, gate)
    text_shift, text_scale, text_gate = rest[3:] or _identity_modulation(gate.last)
    x_BSD, normed = modules.norm.after(residual, text_scale, text_shift)
    attended = modules.text_attn(normed, _modulated_text(modules, inputs), mask=inputs.text_mask)
    return only_linear(modules.text_attn.to_out).add_gated(x_BSD, attended, text_gate)


def _identity_modulation(like_BD: Tensor) -> list[SegmentVectors]:
    """Shift, scale and gate without effect: 0, 0 and 1."""
    zeros = SegmentVectors.same(torch.zeros_like(like_BD))
    return [zeros, zeros, SegmentVectors.same(torch.ones_like(like_BD))]


def _modulated_text(modules: _ModalityModules, inputs: ModalityInputs) -> Tensor:
    if modules.text_table is None:
        return inputs.text
    shift, scale = inputs.rows.text.plus(modules.text_table)
    modulated = inputs.text.float() * (1 + scale.last[:, None]) + shift.last[:, None]
    return modulated.to(inputs.text.dtype)


def _feed_forward(modules: _ModalityModules, residual: Residual, inputs: ModalityInputs) -> Residual:
    shift, scale, gate = inputs.rows.blocks.plus(modules.table)[3:6]
    x_BSD, normed = modules.norm.after(residual, scale, shift)
    out = normed.new_empty(normed.shape)
    modules.ff.into(normed, out)
    return Residual(x_BSD, out, gate)


def run_both_modalities(
    modalities: Modalities, blocks: Sequence[Callable[[Modalities], Modalities]], use: CacheUse | None
) -> Modalities:
    """Both residual streams after all blocks; with a step cache they have no pending updates.

    A computed step is bit-identical with and without a cache. The cache holds both modalities, flattened and
    concatenated: (B, video tokens * D + audio tokens * D).
    """
    if use is None:
        for block in blocks:
            modalities = block(modalities)
        return modalities
    first, *others = blocks
    # Blocks may modify their input in place.
    current = _added(first(Modalities(*(residual._replace(x=residual.x.clone()) for residual in modalities))))
    start = _flattened(current)
    added = start - _flattened(modalities)
    if use.probe:
        return _unflattened(start + use.cache.reuse(added), modalities)
    for block in others:
        current = block(current)
    end = _added(current)
    use.cache.store(added, _flattened(end) - start)
    return end


def _added(modalities: Modalities) -> Modalities:
    """The residual streams with their pending updates added."""
    return Modalities(Residual(modalities.video.added()), Residual(modalities.audio.added()))


def _flattened(modalities: Modalities) -> Tensor:
    """Residual streams, without pending updates, flattened and concatenated in a new tensor."""
    return torch.cat([each.x.flatten(1) for each in modalities], dim=1)


def _unflattened(flat: Tensor, like: Modalities) -> Modalities:
    """Inverse of _flattened(), in the shapes of `like`."""
    video = like.video.x[0].numel()
    parts = (flat[:, :video], flat[:, video:])
    return Modalities(*(Residual(part.reshape(each.x.shape)) for part, each in zip(parts, like, strict=True)))
