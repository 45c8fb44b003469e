"""The Qwen-Image DiT: blocks with separate weights for text and image, and joint attention.

Shapes: N steps, B batch, T text tokens, I tokens of the output image, C tokens of the input images, D hidden size, M
size of all modulations. The image segment holds the I output tokens, then the C input tokens. Parameter names are the
checkpoint's.
"""

# ruff: noqa: N803  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from configs.models.dits.qwen_image import QwenImageTransformerConfig
from models.dits.base import DiffusionTransformer, Predictions, Prepared, entry_point
from models.dits.joint_blocks import run_joint_blocks
from models.layers.embeddings import EmbeddingMLP, sinusoidal_embedding
from models.layers.feed_forward import FeedForward
from models.layers.joint_attention import ImageModulation, JointAttention, block_modulations, joint_block
from models.layers.linear import Linear
from models.layers.norms import LayerNormScaleShift, Residual, RMSNorm
from models.layers.rotary import rotary_embedding
from models.layers.step_cache import CacheUse
from models.rotation import Rotation
from models.token_segments import TokenSegments

SINUSOID_SIZE = 256
NUM_ADDITION_EMBEDDINGS = 2
"""Number of rows of the embedding of the additional condition, `addition_t_embedding`."""


class QwenImageTimeEmbedding(nn.Module):
    """Embedding of the timestep (B, D).

    With `has_addition` it includes row 0 of the embedding of the additional condition, as in Diffusers' pipelines.
    """

    def __init__(self, size: int, *, has_addition: bool = False) -> None:
        super().__init__()
        self.timestep_embedder = EmbeddingMLP(SINUSOID_SIZE, size)
        self.addition_t_embedding = nn.Embedding(NUM_ADDITION_EMBEDDINGS, size) if has_addition else None

    def forward(self, timestep_B: Tensor) -> Tensor:
        """Embed a timestep (B,), float32 in [0, 1]; it is multiplied by 1000 here."""
        embedding: Tensor = self.timestep_embedder(sinusoidal_embedding(timestep_B * 1000, SINUSOID_SIZE))
        return embedding if self.addition_t_embedding is None else embedding + self.addition_t_embedding.weight[0]


class BlockModulation(nn.Sequential):
    """Projection of the activated time embedding to shifts, scales and gates of a block, (B, 6 * D)."""

    def __init__(self, size: int) -> None:
        # Index 0 is SiLU in Diffusers' module; the caller applies SiLU once for all blocks.
        super().__init__(nn.Identity(), Linear(size, 6 * size))


class FinalModulation(nn.Module):
    """Projection of the activated time embedding to scale and shift of the last norm, (B, 2 * D)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = Linear(size, 2 * size)

    def forward(self, activated_BD: Tensor) -> Tensor:
        """Scale, then shift. The caller applies SiLU."""
        parts: Tensor = self.linear(activated_BD)
        return parts


class QwenImageTransformerBlock(nn.Module):
    """Joint attention of text and image, then one feed-forward for each of the two."""

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
        self, residual: Residual, modulations: Iterator[ImageModulation], rotation: Rotation, segments: TokenSegments
    ) -> Residual:
        """Return the residual stream after the block. Takes the next twelve of `modulations`."""
        halves = block_modulations(segments, modulations)
        feed_forwards = (self.txt_mlp, self.img_mlp)
        return joint_block(residual, self.norm, self.attn, feed_forwards, halves, rotation, segments)


class QwenImageTransformer2DModel(DiffusionTransformer):
    """Predicts the velocity of packed latents."""

    def __init__(self, config: QwenImageTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.axes_dims = config.axes_dims_rope
        self.zero_cond_t = config.zero_cond_t
        self.time_text_embed = QwenImageTimeEmbedding(size, has_addition=config.use_additional_t_cond)
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
        condition_states: Tensor | None = None,
        condition_ids: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, I, token channels) of hidden_states (B, I, in_channels).

        - timestep: float32 (B,) in [0, 1].
        - encoder_hidden_states: (B, T, joint_attention_dim), without padding.
        - condition_states: tokens of the input images, (B, C, in_channels).
        - img_ids, txt_ids and condition_ids: positions (I, 3), (T, 3) and (C, 3).
        """
        prepared = self.prepare(timestep[None], encoder_hidden_states, img_ids, txt_ids, condition_ids)
        predictions = self.predict(hidden_states, condition_states=condition_states, use=None, **prepared.inputs(0))
        return predictions["hidden_states"]

    @entry_point
    def prepare(  # type: ignore[override]  # keywords differ by model
        self,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        condition_ids: Tensor | None = None,
    ) -> Prepared:
        """Modulations (N, B, M) for timesteps (N, B), embedded text (B, T, D), and RoPE of all tokens.

        With zero_cond_t the input images have the modulations (B, M) of timestep 0 in every step.
        """
        modulations = self._modulation(timesteps.flatten()).view(*timesteps.shape, -1)
        ids = (txt_ids, img_ids) if condition_ids is None else (txt_ids, img_ids, condition_ids)
        constants = {
            "text_BTD": self.txt_in(self.txt_norm(encoder_hidden_states)),
            **rotary_embedding(torch.cat(ids), self.axes_dims).tensors(),
        }
        if self.zero_cond_t and condition_ids is not None:
            constants["condition_modulation"] = self._modulation(torch.zeros_like(timesteps[0]))
        return Prepared(steps={"modulation": modulations}, constants=constants)

    @entry_point
    def predict(  # type: ignore[override]  # constants differ by model
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        text_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        condition_states: Tensor | None = None,
        condition_modulation: Tensor | None = None,
        use: CacheUse | None = None,
    ) -> Predictions:
        """Velocity (B, I, token channels) of hidden_states, with the modulations (B, M) of a step."""
        images, reference = hidden_states, None
        if condition_states is not None:
            images = torch.cat((hidden_states, condition_states), dim=1)
            if condition_modulation is not None:
                reference = (condition_states.shape[1], condition_modulation)
        normed = run_joint_blocks(
            self.img_in(images),
            text_BTD,
            modulation,
            Rotation(cos, sin),
            self.transformer_blocks,
            self.final_norm,
            use,
            reference,
        )
        return {"hidden_states": self.proj_out(normed)[:, : hidden_states.shape[1]]}

    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """Number of elements of the residual stream: text and image tokens."""
        text = constants["text_BTD"]
        tokens = text.shape[1] + sum(each.shape[1] for each in latents.values())
        return len(text) * tokens * text.shape[2]

    def _modulation(self, timesteps: Tensor) -> Tensor:
        """Modulations (rows, M) for timesteps (rows,)."""
        activated = silu(self.time_text_embed(timesteps))
        return torch.cat([each(activated) for each in self._modulations()], dim=1)

    def _modulations(self) -> Iterator[nn.Module]:
        """Modulation layers, in the order in which the blocks read the modulations."""
        for block in self.transformer_blocks:
            assert isinstance(block, QwenImageTransformerBlock)
            yield from (block.img_mod, block.txt_mod)
        yield self.norm_out
