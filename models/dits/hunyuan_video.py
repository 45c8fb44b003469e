"""The HunyuanVideo DiT: Flux blocks over video and text tokens; the text is refined for each timestep.

Shapes: N steps, B batch, T text tokens, I video tokens, D hidden size, M size of all modulations. Parameter names are
the checkpoint's. Text has no padding, so that attention needs no mask.
"""

# ruff: noqa: N803  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from configs.models.dits.hunyuan_video import PATCH, HunyuanVideoTransformerConfig
from models.dits.base import DiffusionTransformer, Predictions, Prepared, entry_point
from models.dits.flux import (
    FluxConditioningEmbedding,
    FluxModulationLinear,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
    modulations_of,
)
from models.dits.hunyuan_video_refiner import TokenRefiner
from models.dits.joint_blocks import run_joint_blocks
from models.layers.norms import LayerNormScaleShift
from models.layers.rotary import rotary_embedding
from models.layers.step_cache import CacheUse
from models.rotation import Rotation

MAX_TEXT_TOKENS = 1024
"""Largest max_sequence_length of a request."""


class PatchEmbed(nn.Module):
    """Projection of video patches to tokens."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        patch = (1, PATCH, PATCH)
        self.proj = nn.Conv3d(channels, size, patch, stride=patch)

    def forward(self, video: Tensor) -> Tensor:
        """(B, C, frames, 2h, 2w) to (B, frames * h * w, D)."""
        embedded: Tensor = self.proj(video)
        return embedded.flatten(2).transpose(1, 2).contiguous()


class HunyuanVideoTransformer3DModel(DiffusionTransformer):
    """Predicts the velocity of video latents."""

    def __init__(self, config: HunyuanVideoTransformerConfig) -> None:
        super().__init__()
        size, blocks = config.hidden_size, config.blocks
        self.config = config
        self.x_embedder = PatchEmbed(config.in_channels, size)
        self.context_embedder = TokenRefiner(config)
        self.time_text_embed = FluxConditioningEmbedding(blocks, time_scale=1.0)
        self.transformer_blocks = nn.ModuleList(FluxTransformerBlock(blocks) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(blocks) for _ in range(config.num_single_layers)
        )
        self.norm_out = FluxModulationLinear(size, 2)
        self.final_norm = LayerNormScaleShift(size)
        self.proj_out = nn.Linear(size, PATCH * PATCH * config.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None,
        video_ids: Tensor,
    ) -> Tensor:
        """Velocity (B, C, frames, rows, columns) of hidden_states of the same shape.

        - timestep: float32 (B,) in [0, 1000].
        - guidance: float32 (B,), or None for models without a guidance embedding.
        - encoder_hidden_states: (B, T, text_embed_dim), without padding.
        - pooled_projections: (B, pooled_projection_dim).
        - video_ids: frame, row and column of each token, (I, 3).
        """
        prepared = self.prepare(timestep[None], encoder_hidden_states, pooled_projections, guidance, video_ids)
        return self.predict(hidden_states, use=None, **prepared.inputs(0))["hidden_states"]

    @entry_point
    def prepare(  # type: ignore[override]  # keywords differ by model
        self,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None,
        video_ids: Tensor,
    ) -> Prepared:
        """Modulations (N, B, M) and refined text (N, B, T, D) for timesteps (N, B); RoPE of the video."""
        steps, batch = timesteps.shape
        repeated = None if guidance is None else guidance.repeat(steps)
        embedding = self.time_text_embed(timesteps.flatten(), repeated, pooled_projections.repeat(steps, 1))
        activated = silu(embedding)
        modulations = torch.cat([each.linear(activated) for each in self._modulations()], dim=1)
        return Prepared(
            steps={
                "modulation": modulations.view(steps, batch, -1),
                "text_BTD": self.context_embedder(encoder_hidden_states, timesteps),
            },
            constants=rotary_embedding(video_ids, self.config.axes_dims_rope, self.config.rope_theta).tensors(),
        )

    @entry_point
    def predict(  # type: ignore[override]  # constants differ by model
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        text_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        use: CacheUse | None = None,
    ) -> Predictions:
        """Velocity (B, C, frames, rows, columns) from the modulations (B, M) and text (B, T, D) of a step."""
        velocity = self.predict_tokens(self.x_embedder(hidden_states), cos, sin, modulation, text_BTD, use)
        batch, _, frames, rows, columns = hidden_states.shape
        # The order of a patch's channels is (channel, y, x).
        patches = velocity.reshape(batch, frames, rows // PATCH, columns // PATCH, -1, PATCH, PATCH)
        video = patches.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, -1, frames, rows, columns)
        return {"hidden_states": video}

    @entry_point
    def predict_tokens(
        self,
        video_BID: Tensor,
        cos: Tensor,
        sin: Tensor,
        modulation: Tensor,
        text_BTD: Tensor,
        use: CacheUse | None = None,
    ) -> Tensor:
        """Run all blocks on embedded tokens (B, I, D); returns patches of the velocity. RoPE applies to video only."""
        # The angle of text tokens is 0.
        zeros = cos.new_zeros(text_BTD.shape[1], cos.shape[1])
        rotation = Rotation(torch.cat((zeros + 1, cos)), torch.cat((zeros, sin)))
        blocks = (*self.transformer_blocks, *self.single_transformer_blocks)
        normed = run_joint_blocks(video_BID, text_BTD, modulation, rotation, blocks, self.final_norm, use)
        velocity: Tensor = self.proj_out(normed)
        return velocity

    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """Upper bound of the number of elements: video tokens, and text tokens of the longest prompt."""
        del constants
        batch, _, frames, rows, columns = latents["hidden_states"].shape
        tokens = math.prod((frames, rows // PATCH, columns // PATCH)) + MAX_TEXT_TOKENS
        return batch * tokens * self.config.hidden_size

    def _modulations(self) -> Iterator[FluxModulationLinear]:
        return modulations_of(self.transformer_blocks, self.single_transformer_blocks, self.norm_out)
