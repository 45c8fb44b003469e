"""The Flux DiT: blocks with separate weights for text and image, then blocks with shared weights.

Shapes: N steps, B batch, T text tokens, I image tokens, S = T + I (text first), D hidden size, M size of all
modulations. Parameter names are the checkpoint's.
"""

# ruff: noqa: N803, N806  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from configs.models.dits.flux import FluxTransformerConfig
from models.dits.base import DiffusionTransformer, Predictions, Prepared, entry_point
from models.dits.joint_blocks import joint_residual_elements, run_joint_blocks
from models.layers.attention import SelfAttention
from models.layers.embeddings import EmbeddingMLP, sinusoidal_embedding
from models.layers.feed_forward import FeedForward
from models.layers.joint_attention import ImageModulation, JointAttention, block_modulations, joint_block
from models.layers.linear import Linear
from models.layers.norms import LayerNormScaleShift, Residual
from models.layers.rotary import rotary_embedding
from models.layers.step_cache import CacheUse
from models.rotation import Rotation
from models.token_segments import SegmentVectors, TokenSegments

SINUSOID_SIZE = 256


class FluxModulationLinear(nn.Module):
    """Projection of the conditioning vector (B, D) to shifts, scales and gates of a block, (B, parts * D)."""

    def __init__(self, size: int, parts: int) -> None:
        super().__init__()
        self.linear = Linear(size, parts * size)
        self.parts = parts


class FluxConditioningEmbedding(nn.Module):
    """Conditioning vector (B, D): sum of embedded timestep, guidance (distilled models) and pooled prompt.

    `time_scale` is the factor from the range of the timesteps to [0, 1000].
    """

    def __init__(self, config: FluxTransformerConfig, time_scale: float = 1000.0) -> None:
        super().__init__()
        self.time_scale = time_scale
        size = config.hidden_size
        self.timestep_embedder = EmbeddingMLP(SINUSOID_SIZE, size)
        self.guidance_embedder = EmbeddingMLP(SINUSOID_SIZE, size) if config.guidance_embeds else None
        self.text_embedder = EmbeddingMLP(config.pooled_projection_dim, size)

    def forward(self, timestep_B: Tensor, guidance_B: Tensor | None, pooled: Tensor) -> Tensor:
        """Embed timestep (B,) and guidance (B,), both float32; guidance is multiplied by 1000 here."""
        sinusoids = sinusoidal_embedding(timestep_B * self.time_scale, SINUSOID_SIZE)
        embedding: Tensor = self.timestep_embedder(sinusoids)
        if self.guidance_embedder is not None and guidance_B is not None:
            embedding = embedding + self.guidance_embedder(sinusoidal_embedding(guidance_B * 1000, SINUSOID_SIZE))
        text: Tensor = self.text_embedder(pooled)
        return embedding + text


class FluxTransformerBlock(nn.Module):
    """Joint attention of text and image, then one feed-forward for each of the two."""

    def __init__(self, config: FluxTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = LayerNormScaleShift(size)
        self.norm1 = FluxModulationLinear(size, 6)
        self.norm1_context = FluxModulationLinear(size, 6)
        self.attn = JointAttention(size, config.attention_head_dim)
        self.ff = FeedForward(size)
        self.ff_context = FeedForward(size)

    def forward(
        self, residual: Residual, modulations: Iterator[ImageModulation], rotation: Rotation, segments: TokenSegments
    ) -> Residual:
        """Return the residual stream after the block. Takes the next twelve of `modulations`."""
        halves = block_modulations(segments, modulations)
        return joint_block(residual, self.norm, self.attn, (self.ff_context, self.ff), halves, rotation, segments)


class FluxSingleTransformerBlock(nn.Module):
    """Block with the same weights for all tokens: parallel attention and feed-forward, then a projection."""

    def __init__(self, config: FluxTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.layer_norm = LayerNormScaleShift(size)
        self.norm = FluxModulationLinear(size, 3)
        self.attn = SelfAttention(size, config.attention_head_dim)
        self.proj_mlp = Linear(size, 4 * size)
        self.proj_out = Linear(5 * size, size)

    def forward(
        self, residual: Residual, modulations: Iterator[ImageModulation], rotation: Rotation, segments: TokenSegments
    ) -> Residual:
        """Return the residual stream after the block.

        Takes the next three of `modulations`; all segments have the same modulations.
        """
        del segments
        shift, scale, gate = (SegmentVectors.same(each[0]) for each in islice(modulations, 3))
        x_BSD, normed = self.layer_norm.after(residual, scale, shift)
        pending = self.attn.start(normed, rotation)
        size, hidden = (len(layer.weight) for layer in (self.attn.to_q, self.proj_mlp))
        both = normed.new_empty(*normed.shape[:2], size + hidden)
        self.proj_mlp.gelu_into(normed, both[..., size:])
        self.attn.finish(pending, both[..., :size])
        return Residual(x_BSD, self.proj_out(both), gate)


class FluxTransformer2DModel(DiffusionTransformer):
    """Predicts the velocity of packed latents."""

    def __init__(self, config: FluxTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.axes_dims = config.axes_dims_rope
        self.time_text_embed = FluxConditioningEmbedding(config)
        self.context_embedder = Linear(config.joint_attention_dim, size)
        self.x_embedder = Linear(config.in_channels, size)
        self.transformer_blocks = nn.ModuleList(FluxTransformerBlock(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(config) for _ in range(config.num_single_layers)
        )
        self.norm_out = FluxModulationLinear(size, 2)
        self.final_norm = LayerNormScaleShift(size)
        self.proj_out = nn.Linear(size, config.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> Tensor:
        """Velocity (B, I, channels) of hidden_states (B, I, channels).

        - timestep: float32 (B,) in [0, 1].
        - guidance: float32 (B,), or None for models without a guidance embedding.
        - encoder_hidden_states: (B, T, joint_attention_dim).
        - pooled_projections: (B, pooled_projection_dim).
        - img_ids and txt_ids: positions (I, 3) and (T, 3).
        """
        prepared = self.prepare(
            timestep[None], encoder_hidden_states, pooled_projections, guidance, img_ids=img_ids, txt_ids=txt_ids
        )
        return self.predict(hidden_states, use=None, **prepared.inputs(0))["hidden_states"]

    @entry_point
    def prepare(  # type: ignore[override]  # keywords differ by model
        self,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        guidance: Tensor | None,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> Prepared:
        """Modulations (N, B, M) for timesteps (N, B), embedded text (B, T, D), and RoPE of all tokens."""
        steps, batch = timesteps.shape
        repeated = None if guidance is None else guidance.repeat(steps)
        embedding = self.time_text_embed(timesteps.flatten(), repeated, pooled_projections.repeat(steps, 1))
        activated_BD = silu(embedding)
        modulations = torch.cat([each.linear(activated_BD) for each in self._modulations()], dim=1)
        rotation = rotary_embedding(torch.cat((txt_ids, img_ids)), self.axes_dims)
        text_BTD = self.context_embedder(encoder_hidden_states)
        return Prepared(
            steps={"modulation": modulations.view(steps, batch, -1)},
            constants={"text_BTD": text_BTD, **rotation.tensors()},
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
        """Velocity (B, I, channels) of hidden_states (B, I, channels), with the modulations (B, M) of a step."""
        blocks = (*self.transformer_blocks, *self.single_transformer_blocks)
        normed = run_joint_blocks(
            self.x_embedder(hidden_states), text_BTD, modulation, Rotation(cos, sin), blocks, self.final_norm, use
        )
        return {"hidden_states": self.proj_out(normed)}

    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """Number of elements of the residual stream: text and image tokens."""
        return joint_residual_elements(latents["hidden_states"], constants["text_BTD"])

    def _modulations(self) -> Iterator[FluxModulationLinear]:
        return modulations_of(self.transformer_blocks, self.single_transformer_blocks, self.norm_out)


def modulations_of(
    blocks: Iterable[nn.Module], single_blocks: Iterable[nn.Module], last: FluxModulationLinear
) -> Iterator[FluxModulationLinear]:
    """Modulation layers of Flux blocks and of the last norm, in the order in which the blocks read them."""
    for block in blocks:
        assert isinstance(block, FluxTransformerBlock)
        yield from (block.norm1, block.norm1_context)
    for single in single_blocks:
        assert isinstance(single, FluxSingleTransformerBlock)
        yield single.norm
    yield last
