"""The Flux DiT: blocks with a text and an image stream that attend jointly, then blocks over both as one stream.

Shapes: B batch, T text tokens, I image tokens, S = T + I (text first), D hidden size, H heads, K head size.
Parameter names are the checkpoint's. Parallel and fused forms are decided beside the model, not in it.
"""

# ruff: noqa: N803, N806  (the capitals of a tensor's name are its shape)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from configs.models.dits.flux import FluxTransformerConfig
from models.dits.flux_plan import FLUX_PLAN
from models.layers.embeddings import EmbeddingMLP, sinusoidal_embedding
from models.layers.feed_forward import FeedForward
from models.layers.joint_attention import JointAttention, StreamAttention
from models.layers.norms import LayerNormScaleShift
from models.layers.parallelize import parallelize
from models.layers.rotary import Rotation, rotary_embedding
from models.weights import load_module

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from models.layers.mesh import WorkerMesh

SINUSOID_SIZE = 256


class Modulation(nn.Module):
    """Shifts, scales and gates of a block, from the conditioning vector: `parts` tensors (B, D)."""

    def __init__(self, size: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, parts * size)
        self.parts = parts

    def forward(self, activated_BD: Tensor) -> tuple[Tensor, ...]:
        """The parts, in the checkpoint's order. The caller applies SiLU, once for all blocks."""
        parts: Tensor = self.linear(activated_BD)
        return parts.chunk(self.parts, dim=1)


class ConditioningEmbedding(nn.Module):
    """Timestep, guidance (of distilled models) and the pooled prompt, as one vector (B, D)."""

    def __init__(self, config: FluxTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.timestep_embedder = EmbeddingMLP(SINUSOID_SIZE, size)
        self.guidance_embedder = EmbeddingMLP(SINUSOID_SIZE, size) if config.guidance_embeds else None
        self.text_embedder = EmbeddingMLP(config.pooled_projection_dim, size)

    def forward(self, timestep_B: Tensor, guidance_B: Tensor | None, pooled: Tensor) -> Tensor:
        """timestep and guidance are float32; both are multiplied by 1000 here."""
        embedding: Tensor = self.timestep_embedder(sinusoidal_embedding(timestep_B * 1000, SINUSOID_SIZE))
        if self.guidance_embedder is not None and guidance_B is not None:
            embedding = embedding + self.guidance_embedder(sinusoidal_embedding(guidance_B * 1000, SINUSOID_SIZE))
        text: Tensor = self.text_embedder(pooled)
        return embedding + text


class FluxTransformerBlock(nn.Module):
    """A block with two streams: joint attention, then a feed-forward each."""

    def __init__(self, config: FluxTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = LayerNormScaleShift(size)
        self.norm1 = Modulation(size, 6)
        self.norm1_context = Modulation(size, 6)
        self.attn = JointAttention(size, config.attention_head_dim)
        self.ff = FeedForward(size)
        self.ff_context = FeedForward(size)

    def forward(
        self, image_BID: Tensor, text_BTD: Tensor, activated_BD: Tensor, rotation: Rotation
    ) -> tuple[Tensor, Tensor]:
        """The next image and text streams."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.norm1(activated_BD)
        c_shift, c_scale, c_gate, c_ff_shift, c_ff_scale, c_ff_gate = self.norm1_context(activated_BD)
        image, text = self.attn.joint(
            self.norm(image_BID, scale, shift), self.norm(text_BTD, c_scale, c_shift), rotation
        )
        image_BID = image_BID + gate[:, None] * image
        image_BID = image_BID + ff_gate[:, None] * self.ff(self.norm(image_BID, ff_scale, ff_shift))
        text_BTD = text_BTD + c_gate[:, None] * text
        text_BTD = text_BTD + c_ff_gate[:, None] * self.ff_context(self.norm(text_BTD, c_ff_scale, c_ff_shift))
        return image_BID, text_BTD


class FluxSingleTransformerBlock(nn.Module):
    """A block with one stream: attention and feed-forward side by side, projected together."""

    def __init__(self, config: FluxTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.layer_norm = LayerNormScaleShift(size)
        self.norm = Modulation(size, 3)
        self.attn = StreamAttention(size, config.attention_head_dim)
        self.proj_mlp = nn.Linear(size, 4 * size)
        self.proj_out = nn.Linear(5 * size, size)

    def forward(self, x_BSD: Tensor, activated_BD: Tensor, rotation: Rotation) -> Tensor:
        """The next stream."""
        shift, scale, gate = self.norm(activated_BD)
        normed = self.layer_norm(x_BSD, scale, shift)
        attended = self.attn(normed, rotation)
        hidden = gelu(self.proj_mlp(normed), approximate="tanh")
        update: Tensor = gate[:, None] * self.proj_out(torch.cat((attended, hidden), dim=2))
        return x_BSD + update


class FluxTransformer2DModel(nn.Module):
    """Predicts the velocity of packed latents."""

    def __init__(self, config: FluxTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.axes_dims = config.axes_dims_rope
        self.time_text_embed = ConditioningEmbedding(config)
        self.context_embedder = nn.Linear(config.joint_attention_dim, size)
        self.x_embedder = nn.Linear(config.in_channels, size)
        self.transformer_blocks = nn.ModuleList(FluxTransformerBlock(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(config) for _ in range(config.num_single_layers)
        )
        self.norm_out = Modulation(size, 2)
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

        timestep is float32 (B,) in [0, 1]; guidance float32 (B,), or None for models without it; encoder_hidden_states
        (B, T, joint_attention_dim); pooled_projections (B, pooled_projection_dim); positions (tokens, 3).
        """
        rotation = rotary_embedding(torch.cat((txt_ids, img_ids)), self.axes_dims)
        activated_BD = silu(self.time_text_embed(timestep, guidance, pooled_projections))
        image_BID = self.x_embedder(hidden_states)
        text_BTD = self.context_embedder(encoder_hidden_states)
        for block in self.transformer_blocks:
            image_BID, text_BTD = block(image_BID, text_BTD, activated_BD, rotation)
        x_BSD = torch.cat((text_BTD, image_BID), dim=1)
        for block in self.single_transformer_blocks:
            x_BSD = block(x_BSD, activated_BD, rotation)
        scale, shift = self.norm_out(activated_BD)
        velocity: Tensor = self.proj_out(self.final_norm(x_BSD[:, text_BTD.shape[1] :], scale, shift))
        return velocity


def load_flux_transformer(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None
) -> FluxTransformer2DModel:
    """Build the DiT of the module's config.json, or this rank's part of it, and read its weights.

    Raises CheckpointError, and InvalidInput for a mesh whose degrees do not divide the model.
    """
    config = FluxTransformerConfig.from_dict(name, checkpoint.module_config(name))
    with torch.device("meta"):
        model = FluxTransformer2DModel(config)
    parallelize(model, FLUX_PLAN, mesh, heads=config.num_attention_heads)
    load_module(model, name, checkpoint.weight_files(name), device, dtype)
    return model
