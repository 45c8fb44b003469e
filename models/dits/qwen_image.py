"""The Qwen-Image DiT: blocks with a text and an image stream that attend jointly.

Shapes: N steps, B batch, T text tokens, I image tokens (the picture's own first, then those of pictures given), D
hidden size, M all modulations. Parameter names are the checkpoint's.
"""

# ruff: noqa: N803, N806  (the capitals of a tensor's name are its shape)

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from configs.models.dits.qwen_image import QwenImageTransformerConfig
from models.dits.base import DiffusionTransformer, Predictions, Prepared
from models.dits.joint_stream import joint_residual_elements, through_joint_blocks
from models.dits.loading import load_transformer
from models.dits.qwen_image_plan import QWEN_IMAGE_PLAN
from models.layers.embeddings import EmbeddingMLP, sinusoidal_embedding
from models.layers.feed_forward import FeedForward
from models.layers.joint_attention import JointAttention, block_modulations, joint_block
from models.layers.linear import Linear
from models.layers.norms import LayerNormScaleShift, Residual, RMSNorm
from models.layers.rotary import Rotation, rotary_embedding
from models.layers.step_cache import CacheUse

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
    """Shift, scale and gate for each half of a block, from the timestep's vector: six vectors of its size."""

    def __init__(self, size: int) -> None:
        # Position 0 is the checkpoint's SiLU; the caller applies it, once for all blocks.
        super().__init__(nn.Identity(), Linear(size, 6 * size))


class FinalModulation(nn.Module):
    """Scale and shift of the last norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = Linear(size, 2 * size)

    def forward(self, activated_BD: Tensor) -> Tensor:
        """Scale first. The caller applies SiLU."""
        parts: Tensor = self.linear(activated_BD)
        return parts


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

    def forward(self, residual: Residual, parts: Iterator[Tensor], rotation: Rotation, boundary: int) -> Residual:
        """The next residual; takes its modulations from `parts`."""
        modulations = block_modulations(parts)
        feed_forwards = (self.txt_mlp, self.img_mlp)
        return joint_block(residual, self.norm, self.attn, feed_forwards, modulations, rotation, boundary)


class QwenImageTransformer2DModel(DiffusionTransformer):
    """Predicts the velocity of packed latents."""

    block_linears: ClassVar[tuple[str, ...]] = QWEN_IMAGE_PLAN.block_linears

    def __init__(self, config: QwenImageTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.axes_dims = config.axes_dims_rope
        self.time_text_embed = TimeEmbedding(size)
        self.txt_norm = RMSNorm(config.joint_attention_dim)
        self.img_in = Linear(config.in_channels, size)
        self.txt_in = Linear(config.joint_attention_dim, size)
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
        prepared = self.prepare(timestep[None], encoder_hidden_states, img_ids, txt_ids)
        modulation = prepared.steps["modulation"][0]
        return self.predict(hidden_states, modulation, use=None, **prepared.constants)["hidden_states"]

    def prepare(  # type: ignore[override]  # which keywords there are differs by model
        self, timesteps: Tensor, encoder_hidden_states: Tensor, img_ids: Tensor, txt_ids: Tensor
    ) -> Prepared:
        """Modulations of all blocks (N, B, M) for timesteps (N, B), the embedded text, the rotation of all tokens."""
        activated_BD = silu(self.time_text_embed(timesteps.flatten()))
        modulations = torch.cat([each(activated_BD) for each in self._modulations()], dim=1)
        rotation = rotary_embedding(torch.cat((txt_ids, img_ids)), self.axes_dims)
        text_BTD = self.txt_in(self.txt_norm(encoder_hidden_states))
        return Prepared(
            steps={"modulation": modulations.view(*timesteps.shape, -1)},
            constants={"text_BTD": text_BTD, **rotation.tensors()},
        )

    def predict(  # type: ignore[override]  # which constants there are differs by model
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        text_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        use: CacheUse | None = None,
    ) -> Predictions:
        """Velocity (B, I, token channels), with a step's modulations (B, M)."""
        normed = through_joint_blocks(
            self.img_in(hidden_states),
            text_BTD,
            modulation,
            Rotation(cos, sin),
            self.transformer_blocks,
            self.final_norm,
            use,
        )
        return {"hidden_states": self.proj_out(normed)}

    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """Text and image tokens."""
        return joint_residual_elements(latents["hidden_states"], constants["text_BTD"])

    def _modulations(self) -> Iterator[nn.Module]:
        """In the order in which predict() takes their parts."""
        for block in self.transformer_blocks:
            assert isinstance(block, QwenImageTransformerBlock)
            yield from (block.img_mod, block.txt_mod)
        yield self.norm_out


def load_qwen_image_transformer(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None
) -> QwenImageTransformer2DModel:
    """The DiT of the module's config.json, or this rank's part of it. Raises as load_transformer()."""
    config = QwenImageTransformerConfig.from_dict(name, checkpoint.module_config(name))
    build = partial(QwenImageTransformer2DModel, config)
    return load_transformer(
        build, QWEN_IMAGE_PLAN, checkpoint, name, device, dtype, mesh, heads=config.num_attention_heads
    )
