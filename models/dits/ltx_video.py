"""The LTX-Video DiT: self-attention of packed video tokens, then cross-attention to the text.

Shapes: N steps, B batch, S video tokens, C channels, T text tokens, D hidden size, H heads, K head size. Parameter
names are the checkpoint's. Norms, modulation and gates are computed in float32. Text has no padding, so that attention
needs no mask.

In image-to-video the tokens of the first latent frame have a separate timestep: they are the first of two token
segments.
"""

# ruff: noqa: N803, N806  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from configs.models.dits.ltx_video import LTXVideoTransformerConfig
from models.dits.base import DiffusionTransformer, Predictions, Prepared, entry_point
from models.layers.attention import SelfAttention
from models.layers.cross_attention import CrossAttention
from models.layers.embeddings import TextProjection
from models.layers.feed_forward import FeedForward
from models.layers.head_rotary import SelectHeads, head_rotation
from models.layers.linear import Linear, only_linear
from models.layers.norms import LayerNormScaleShift, Residual, RMSNormScaleShift
from models.layers.step_cache import CacheUse, run_blocks
from models.layers.time_modulation import TimeModulation
from models.rotation import HeadRotation
from models.token_segments import SegmentVectors, TokenSegments, vectors_of_rows

VIDEO, FIRST_FRAME = "video", "first_frame"
"""Token segments with separate timesteps; keys of the result of predict_tokens()."""

ATTENTION_EPS = 1e-5
"""Epsilon of the norms of queries and keys."""

BLOCK_ROWS = 6
"""Number of modulations of a block: shift, scale and gate of self-attention, then of the feed-forward."""

_OUTPUT_NORM_EPS = 1e-6

_EXTENTS = (20, 2048, 2048)
"""Ranges of the RoPE positions: seconds, rows (pixels), columns (pixels)."""

_THETA = 10000.0
"""Base of the RoPE frequencies."""


class LTXVideoAttention(SelfAttention):
    """Self-attention of video tokens; RoPE angles differ between heads."""

    def __init__(self, size: int, head_size: int) -> None:
        super().__init__(size, head_size, norm_size=size, eps=ATTENTION_EPS)
        self.to_out = nn.ModuleList([Linear(size, size)])
        self.select_heads = SelectHeads()

    def rotation_of(self, cos: Tensor, sin: Tensor) -> HeadRotation:
        """RoPE of this module's heads, from cos and sin (S, H, K / 2) of all heads."""
        return HeadRotation(self.select_heads(cos), self.select_heads(sin), is_neox_style=False)


class LTXVideoTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward. The first and the last are modulated and gated."""

    def __init__(self, config: LTXVideoTransformerConfig) -> None:
        super().__init__()
        size, head_size = config.hidden_size, config.attention_head_dim
        self.norm = RMSNormScaleShift(size, config.eps)
        self.attn1 = LTXVideoAttention(size, head_size)
        self.attn2 = CrossAttention(size, head_size, ATTENTION_EPS)
        self.ff = FeedForward(size)
        self.scale_shift_table = nn.Parameter(torch.zeros(BLOCK_ROWS, size))

    def forward(
        self,
        residual: Residual,
        modulation: Sequence[SegmentVectors],
        text_kv: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Residual:
        """Return the residual stream after the block.

        The six modulations are float32. There is no norm before cross-attention.
        """
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation
        x_BSD, normed = self.norm.after(residual, scale, shift)
        attended = self.attn1(normed, self.attn1.rotation_of(cos, sin))
        residual = only_linear(self.attn1.to_out).add_gated(x_BSD, attended, gate)
        x_BSD = residual.added()
        one = SegmentVectors.same(torch.ones_like(gate.last))
        residual = only_linear(self.attn2.to_out).add_gated(x_BSD, self.attn2(x_BSD, text_kv), one)
        x_BSD, normed = self.norm.after(residual, ff_scale, ff_shift)
        ff_out = normed.new_empty(normed.shape)
        self.ff.into(normed, ff_out)
        return Residual(x_BSD, ff_out, ff_gate)


class LTXVideoTransformer3DModel(DiffusionTransformer):
    """Predicts the velocity of video latents."""

    def __init__(self, config: LTXVideoTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.proj_in = nn.Linear(config.in_channels, size)
        self.time_embed = TimeModulation(size, BLOCK_ROWS)
        self.caption_projection = TextProjection(config.caption_channels, size)
        self.transformer_blocks = nn.ModuleList(LTXVideoTransformerBlock(config) for _ in range(config.num_layers))
        self.norm_out = LayerNormScaleShift(size, _OUTPUT_NORM_EPS)
        self.proj_out = nn.Linear(size, config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, size))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        positions: Tensor,
        first_positions: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, S, C) of hidden_states of the same shape.

        - timestep: (B,) in [0, 1000], or (B, 2): the first latent frame's timestep, then the other frames' timestep.
        - encoder_hidden_states: (B, T, caption_channels), without padding.
        - positions: time (seconds), row and column (pixels) of each token, (S, 3). With two timesteps, first_positions
          are for the first latent frame, and positions for the other frames.
        """
        prepared = self.prepare(timestep[None], encoder_hidden_states, positions, first_positions)
        return self.predict(hidden_states, use=None, **prepared.inputs(0))["hidden_states"]

    @entry_point
    def prepare(  # type: ignore[override]  # keywords differ by model
        self,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        positions: Tensor,
        first_positions: Tensor | None = None,
    ) -> Prepared:
        """Float32 modulations (N, B, 6 * blocks + 2, D) for timesteps (N, B), keys and values of text, RoPE.

        For timesteps (N, B, 2) of two segments, "first_modulation" is for the first latent frame, and "modulation" for
        the other frames. Keys and values are (blocks, B, T, 2 * D), cos and sin (S, H, K / 2).
        """
        segments = timesteps.unbind(-1) if timesteps.ndim == 3 else (timesteps,)
        names = ("first_modulation", "modulation")[-len(segments) :]
        text_BTD = self.caption_projection(encoder_hidden_states)
        rotation = self._rotation(positions)
        constants = {
            "text_kv": torch.stack([block.attn2.keys_and_values(text_BTD) for block in self._blocks()]),
            "cos": rotation.cos,
            "sin": rotation.sin,
        }
        if first_positions is not None:
            first = self._rotation(first_positions)
            constants |= {"first_cos": first.cos, "first_sin": first.sin}
        return Prepared({name: self._modulation(each) for name, each in zip(names, segments, strict=True)}, constants)

    def _modulation(self, timesteps_NB: Tensor) -> Tensor:
        """Float32 modulations (N, B, 6 * blocks + 2, D): six per block, then shift and scale of the last norm."""
        rows, embedding = self.time_embed(timesteps_NB.flatten())
        tables = [block.scale_shift_table.float() + rows for block in self._blocks()]
        joined = torch.cat((*tables, self.scale_shift_table.float() + embedding), dim=1)
        return joined.view(*timesteps_NB.shape, *joined.shape[1:])

    def _rotation(self, positions: Tensor) -> HeadRotation:
        config = self.config
        heads, head_size = config.num_attention_heads, config.attention_head_dim
        return head_rotation(positions, _EXTENTS, heads, head_size, theta=_THETA, is_neox_style=False, is_double=False)

    @entry_point
    def predict(  # type: ignore[override]  # constants differ by model
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        text_kv: Tensor,
        cos: Tensor,
        sin: Tensor,
        first_modulation: Tensor | None = None,
        first_cos: Tensor | None = None,
        first_sin: Tensor | None = None,
        use: CacheUse | None = None,
    ) -> Predictions:
        """Velocity (B, S, C) of hidden_states (B, S, C) at a step with modulations (B, 6 * blocks + 2, D).

        The `first_` arguments are for the first latent frame; None: it has the same timestep as the other frames.
        """
        x_BSD = self.proj_in(hidden_states)
        if first_cos is None:
            return {"hidden_states": self.predict_tokens(x_BSD, cos, sin, modulation, text_kv, use=use)[VIDEO]}
        first, video = TokenSegments((len(first_cos), len(cos))).slices()
        segments = self.predict_tokens(
            x_BSD[:, video],
            cos,
            sin,
            modulation,
            text_kv,
            first_BSD=x_BSD[:, first],
            first_cos=first_cos,
            first_sin=first_sin,
            first_modulation=first_modulation,
            use=use,
        )
        return {"hidden_states": torch.cat((segments[FIRST_FRAME], segments[VIDEO]), dim=1)}

    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """Number of elements of the residual stream: video tokens."""
        del constants
        batch, tokens, _ = latents["hidden_states"].shape
        return batch * tokens * self.norm_out.size

    @entry_point
    def predict_tokens(
        self,
        x_BSD: Tensor,
        cos: Tensor,
        sin: Tensor,
        modulation: Tensor,
        text_kv: Tensor,
        first_BSD: Tensor | None = None,
        first_cos: Tensor | None = None,
        first_sin: Tensor | None = None,
        first_modulation: Tensor | None = None,
        use: CacheUse | None = None,
    ) -> dict[str, Tensor]:
        """Run all blocks, the last norm and the projection on embedded tokens (B, S, D).

        Returns tokens (B, tokens, C) by segment: "video", and "first_frame" if there is one.
        """
        segments = None
        if first_BSD is not None and first_cos is not None and first_sin is not None:
            segments = TokenSegments((first_BSD.shape[1], x_BSD.shape[1]))
            x_BSD = torch.cat((first_BSD, x_BSD), dim=1)
            cos, sin = torch.cat((first_cos, cos)), torch.cat((first_sin, sin))
        vectors = vectors_of_rows(segments, first_modulation, modulation)
        blocks = [
            partial(
                block,
                modulation=vectors[BLOCK_ROWS * index : BLOCK_ROWS * (index + 1)],
                text_kv=text_kv[index],
                cos=cos,
                sin=sin,
            )
            for index, block in enumerate(self._blocks())
        ]
        residual = run_blocks(Residual(x_BSD), blocks, use)
        shift, scale = vectors[-2:]
        tokens: Tensor = self.proj_out(self.norm_out.after(residual, scale, shift)[1])
        if segments is None:
            return {VIDEO: tokens}
        first, video = segments.slices()
        return {FIRST_FRAME: tokens[:, first], VIDEO: tokens[:, video]}

    def _blocks(self) -> Iterator[LTXVideoTransformerBlock]:
        for block in self.transformer_blocks:
            assert isinstance(block, LTXVideoTransformerBlock)
            yield block
