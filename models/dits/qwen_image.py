"""The Qwen-Image DiT: blocks with a text and an image stream that attend jointly.

Shapes: B batch, T text tokens, I image tokens (the picture's own first, then those of pictures given), D hidden size.
Parameter names are the checkpoint's.
"""

# ruff: noqa: N803, N806  (the capitals of a tensor's name are its shape)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from configs.models.dits.qwen_image import QwenImageTransformerConfig
from models.dits.qwen_image_plan import QWEN_IMAGE_PLAN
from models.layers.embeddings import EmbeddingMLP, sinusoidal_embedding
from models.layers.feed_forward import FeedForward
from models.layers.joint_attention import JointAttention
from models.layers.norms import LayerNormScaleShift, RMSNorm
from models.layers.parallelize import parallelize
from models.layers.rotary import Rotation, rotary_embedding
from models.weights import load_module

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from models.layers.mesh import WorkerMesh

SINUSOID_SIZE = 256


class TimeEmbedding(nn.Module):
    """The timestep as a vector (B, D)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.timestep_embedder = EmbeddingMLP(SINUSOID_SIZE, size)

    def forward(self, timestep_B: Tensor) -> Tensor:
        """timestep is float32 in [0, 1]; it is multiplied by 1000 here."""
        embedding: Tensor = self.timestep_embedder(sinusoidal_embedding(timestep_B * 1000, SINUSOID_SIZE))
        return embedding


class BlockModulation(nn.Sequential):
    """Shift, scale and gate for each half of a block, from the timestep's vector: six tensors (B, D)."""

    def __init__(self, size: int) -> None:
        # Position 0 is the checkpoint's SiLU; the caller applies it, once for all blocks.
        super().__init__(nn.Identity(), nn.Linear(size, 6 * size))

    def forward(self, activated_BD: Tensor) -> tuple[Tensor, ...]:
        """Attention's three, then the feed-forward's three."""
        parts: Tensor = self[1](activated_BD)
        return parts.chunk(6, dim=1)


class FinalModulation(nn.Module):
    """Scale and shift of the last norm: two tensors (B, D)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 2 * size)

    def forward(self, activated_BD: Tensor) -> tuple[Tensor, ...]:
        """Scale first. The caller applies SiLU."""
        parts: Tensor = self.linear(activated_BD)
        return parts.chunk(2, dim=1)


class QwenImageTransformerBlock(nn.Module):
    """Joint attention, then a feed-forward for each stream."""

    def __init__(self, config: QwenImageTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = LayerNormScaleShift(size)
        self.img_mod = BlockModulation(size)
        self.txt_mod = BlockModulation(size)
        self.attn = JointAttention(size, config.attention_head_dim)
        self.img_mlp = FeedForward(size)
        self.txt_mlp = FeedForward(size)

    def forward(
        self, image_BID: Tensor, text_BTD: Tensor, activated_BD: Tensor, rotation: Rotation
    ) -> tuple[Tensor, Tensor]:
        """The next image and text streams."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.img_mod(activated_BD)
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = self.txt_mod(activated_BD)
        image, text = self.attn.joint(
            self.norm(image_BID, scale, shift), self.norm(text_BTD, t_scale, t_shift), rotation
        )
        image_BID = image_BID + gate[:, None] * image
        image_BID = image_BID + mlp_gate[:, None] * self.img_mlp(self.norm(image_BID, mlp_scale, mlp_shift))
        text_BTD = text_BTD + t_gate[:, None] * text
        text_BTD = text_BTD + t_mlp_gate[:, None] * self.txt_mlp(self.norm(text_BTD, t_mlp_scale, t_mlp_shift))
        return image_BID, text_BTD


class QwenImageTransformer2DModel(nn.Module):
    """Predicts the velocity of packed latents."""

    def __init__(self, config: QwenImageTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.axes_dims = config.axes_dims_rope
        self.time_text_embed = TimeEmbedding(size)
        self.txt_norm = RMSNorm(config.joint_attention_dim)
        self.img_in = nn.Linear(config.in_channels, size)
        self.txt_in = nn.Linear(config.joint_attention_dim, size)
        self.transformer_blocks = nn.ModuleList(QwenImageTransformerBlock(config) for _ in range(config.num_layers))
        self.norm_out = FinalModulation(size)
        self.final_norm = LayerNormScaleShift(size)
        self.proj_out = nn.Linear(size, config.token_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> Tensor:
        """Velocity (B, I, token channels) of hidden_states (B, I, in_channels).

        timestep is float32 (B,) in [0, 1]; encoder_hidden_states (B, T, joint_attention_dim), without padding;
        positions (tokens, 3).
        """
        rotation = rotary_embedding(torch.cat((txt_ids, img_ids)), self.axes_dims)
        activated_BD = silu(self.time_text_embed(timestep))
        image_BID = self.img_in(hidden_states)
        text_BTD = self.txt_in(self.txt_norm(encoder_hidden_states))
        for block in self.transformer_blocks:
            image_BID, text_BTD = block(image_BID, text_BTD, activated_BD, rotation)
        scale, shift = self.norm_out(activated_BD)
        velocity: Tensor = self.proj_out(self.final_norm(image_BID, scale, shift))
        return velocity


def load_qwen_image_transformer(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None
) -> QwenImageTransformer2DModel:
    """Build the DiT of the module's config.json, or this rank's part of it, and read its weights.

    Raises CheckpointError, and InvalidInput for a mesh whose degrees do not divide the model.
    """
    config = QwenImageTransformerConfig.from_dict(name, checkpoint.module_config(name))
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(config)
    parallelize(model, QWEN_IMAGE_PLAN, mesh, heads=config.num_attention_heads)
    load_module(model, name, checkpoint.weight_files(name), device, dtype)
    return model
