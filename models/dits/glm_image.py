"""The GLM-Image DiT: glyph and image tokens with shared weights and separate modulations.

Shapes: N steps, B batch, T glyph tokens, I image tokens, S = T + I (glyphs first), C channels of a 2x2 patch, D hidden
size, E size of the time embedding, M size of all modulations. Parameter names are the checkpoint's.
"""

# ruff: noqa: N803, N806  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from configs.models.dits.glm_image import GlmImageTransformerConfig
from configs.pipeline_configs.packed import pack_patches, unpack_patches
from models.dits.base import DiffusionTransformer, Predictions, Prepared, entry_point
from models.dits.joint_blocks import run_joint_blocks
from models.layers.attention import SelfAttention
from models.layers.embeddings import EmbeddingMLP, sinusoidal_embedding
from models.layers.feed_forward import FeedForward
from models.layers.joint_attention import ImageModulation
from models.layers.linear import Linear, only_linear
from models.layers.norms import LayerNormScaleShift, PlainLayerNorm, Residual
from models.layers.rotary import rotary_embedding
from models.layers.step_cache import CacheUse
from models.rotation import Rotation
from models.token_segments import TokenSegments

EPS = 1e-5
"""Epsilon of all layer norms."""

MODULATIONS = 12
"""Number of modulations of a block.

They are shift, scale and gate of attention, then of the feed-forward; each for the image, then for the glyphs.
"""


class TimeAndSizeEmbedding(nn.Module):
    """Activated time embedding (E): SiLU of the sum of the embedded timestep, crop and image size."""

    def __init__(self, config: GlmImageTransformerConfig) -> None:
        super().__init__()
        self.sinusoid_size = config.time_embed_dim
        self.condition_dim = config.condition_dim
        self.timestep_embedder = EmbeddingMLP(config.time_embed_dim, config.time_embed_dim)
        # Four numbers: row and column of the crop's corner, height and width of the image.
        self.condition_embedder = EmbeddingMLP(4 * config.condition_dim, config.time_embed_dim)

    def forward(self, timesteps_NB: Tensor, target_size: Tensor, crop_coords: Tensor) -> Tensor:
        """(N, B, E) for timesteps (N, B) in [0, 1000], and target_size and crop_coords (B, 2) in pixels."""
        sinusoids = sinusoidal_embedding(timesteps_NB.flatten(), self.sinusoid_size)
        numbers = torch.cat((crop_coords, target_size), dim=1)
        condition = sinusoidal_embedding(numbers.flatten(), self.condition_dim).view(len(numbers), -1)
        time_NBE: Tensor = self.timestep_embedder(sinusoids).view(*timesteps_NB.shape, -1)
        return silu(time_NBE + self.condition_embedder(condition))


class GlmImageModulationLinear(nn.Module):
    """Projection of the activated time embedding (E) to `parts` modulations of size D."""

    def __init__(self, time_size: int, size: int, parts: int) -> None:
        super().__init__()
        self.linear = Linear(time_size, parts * size)

    def forward(self, activated_E: Tensor) -> Tensor:
        """(..., E) to (..., parts * D)."""
        parts: Tensor = self.linear(activated_E)
        return parts


class ImageProjector(nn.Module):
    """Projection of image patches to tokens."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.proj = Linear(channels, size)

    def forward(self, image_BIC: Tensor) -> Tensor:
        """(B, I, C) to (B, I, D)."""
        projected: Tensor = self.proj(image_BIC)
        return projected


class GlmImageAttention(SelfAttention):
    """Self-attention of glyph and image tokens. Queries and keys have layer norms without weights."""

    def __init__(self, size: int, head_size: int) -> None:
        super().__init__(size, head_size, eps=EPS, norm=PlainLayerNorm)
        self.to_out = nn.ModuleList([Linear(size, size)])


class GlmImageTransformerBlock(nn.Module):
    """Attention, then a feed-forward; both are modulated and gated by the time embedding."""

    def __init__(self, config: GlmImageTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = LayerNormScaleShift(size, EPS)
        self.norm1 = GlmImageModulationLinear(config.time_embed_dim, size, MODULATIONS)
        self.attn1 = GlmImageAttention(size, config.attention_head_dim)
        self.ff = FeedForward(size)

    def forward(
        self, residual: Residual, modulations: Iterator[ImageModulation], rotation: Rotation, segments: TokenSegments
    ) -> Residual:
        """Return the residual stream after the block. Takes the next twelve of `modulations`."""
        vectors_BD = [each[0] for each in islice(modulations, MODULATIONS)]
        pairs = zip(vectors_BD[::2], vectors_BD[1::2], strict=True)
        vectors = [segments.vectors(glyph, image) for image, glyph in pairs]
        shift, scale, gate, ff_shift, ff_scale, ff_gate = vectors
        x_BSD, normed = self.norm.after(residual, scale, shift)
        attended = self.attn1(normed, rotation)
        residual = only_linear(self.attn1.to_out).add_gated(x_BSD, attended, gate)
        x_BSD, normed = self.norm.after(residual, ff_scale, ff_shift)
        ff_out = normed.new_empty(normed.shape)
        self.ff.into(normed, ff_out)
        return Residual(x_BSD, ff_out, ff_gate)


class GlmImageTransformer2DModel(DiffusionTransformer):
    """Predicts the velocity of image latents."""

    def __init__(self, config: GlmImageTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        # RoPE rotates half of the channels of a head by the token's row, the other half by its column.
        self.axes_dims = (config.attention_head_dim // 2,) * 2
        self.out_channels = config.out_channels
        self.image_projector = ImageProjector(4 * config.in_channels, size)
        self.glyph_projector = FeedForward(config.text_embed_dim, size, size, activation="gelu")
        self.prior_token_embedding = nn.Embedding(config.codebook_size, size)
        self.prior_projector = FeedForward(size, size, activation="silu")
        self.time_condition_embed = TimeAndSizeEmbedding(config)
        self.transformer_blocks = nn.ModuleList(GlmImageTransformerBlock(config) for _ in range(config.num_layers))
        self.norm_out = GlmImageModulationLinear(config.time_embed_dim, size, 2)
        self.final_norm = LayerNormScaleShift(size, EPS)
        self.proj_out = nn.Linear(size, 4 * config.out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        prior_token_id: Tensor,
        prior_token_drop: Tensor,
        target_size: Tensor,
        crop_coords: Tensor,
    ) -> Tensor:
        """Velocity (B, out_channels, rows, columns) of hidden_states (B, in_channels, rows, columns).

        - timestep: (B,) in [0, 1000].
        - encoder_hidden_states: (B, T, text_embed_dim), without padding.
        - prior_token_id: int64 (B, I).
        - prior_token_drop: bool (B, I), True where the prior token is not used.
        - target_size: height and width of the image in pixels, (B, 2).
        - crop_coords: row and column of the crop's corner in pixels, (B, 2).
        """
        prepared = self.prepare(
            timestep[None], encoder_hidden_states, prior_token_id, prior_token_drop, target_size, crop_coords
        )
        return self.predict(hidden_states, use=None, **prepared.inputs(0))["hidden_states"]

    @entry_point
    def prepare(  # type: ignore[override]  # keywords differ by model
        self,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        prior_token_id: Tensor,
        prior_token_drop: Tensor,
        target_size: Tensor,
        crop_coords: Tensor,
    ) -> Prepared:
        """Modulations (N, B, M) for timesteps (N, B), embedded glyphs (B, T, D) and embedded prior tokens."""
        activated_NBE = self.time_condition_embed(timesteps, target_size, crop_coords)
        modulations = torch.cat([each(activated_NBE) for each in self._modulations()], dim=-1)
        embedded: Tensor = self.prior_token_embedding(prior_token_id)
        embedded = embedded.masked_fill(prior_token_drop[..., None], 0.0)
        return Prepared(
            steps={"modulation": modulations},
            constants={
                "text_BTD": self.glyph_projector(encoder_hidden_states),
                "prior_BID": self.prior_projector(embedded),
            },
        )

    @entry_point
    def predict(  # type: ignore[override]  # constants differ by model
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        text_BTD: Tensor,
        prior_BID: Tensor,
        use: CacheUse | None = None,
    ) -> Predictions:
        """Velocity (B, out_channels, rows, columns) of hidden_states, with the modulations (B, M) of a step."""
        rows, columns = hidden_states.shape[2:]
        rotation = self._rotation(hidden_states)
        patches = pack_patches(hidden_states)
        velocity = self.predict_tokens(patches, rotation.cos, rotation.sin, modulation, text_BTD, prior_BID, use)
        return {"hidden_states": unpack_patches(velocity, self.out_channels, rows, columns)}

    @entry_point
    def predict_tokens(
        self,
        image_BIC: Tensor,
        cos: Tensor,
        sin: Tensor,
        modulation: Tensor,
        text_BTD: Tensor,
        prior_BID: Tensor,
        use: CacheUse | None = None,
    ) -> Tensor:
        """Run all blocks on patches (B, I, C); returns patches of the velocity. RoPE applies to image tokens only."""
        # The angle of glyph tokens is 0.
        zeros = cos.new_zeros(text_BTD.shape[1], cos.shape[1])
        rotation = Rotation(torch.cat((zeros + 1, cos)), torch.cat((zeros, sin)), is_neox_style=True)
        image_BID = self.image_projector(image_BIC) + prior_BID
        normed = run_joint_blocks(
            image_BID, text_BTD, modulation, rotation, self.transformer_blocks, self.final_norm, use
        )
        velocity: Tensor = self.proj_out(normed)
        return velocity

    def cached_tensors(self, latents: Mapping[str, Tensor]) -> Rotation:
        """RoPE of the image tokens."""
        return self._rotation(latents["hidden_states"])

    def _rotation(self, hidden_states: Tensor) -> Rotation:
        rows, columns = hidden_states.shape[2:]
        return _image_rotation((rows // 2, columns // 2), self.axes_dims, hidden_states.device)

    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """Number of elements of the residual stream: glyph and image tokens."""
        image = latents["hidden_states"]
        tokens = constants["text_BTD"].shape[1] + math.prod(side // 2 for side in image.shape[2:])
        return len(image) * tokens * self.final_norm.size

    def _modulations(self) -> Iterator[nn.Module]:
        """Modulation layers, in the order in which the blocks read the modulations."""
        for block in self.transformer_blocks:
            assert isinstance(block, GlmImageTransformerBlock)
            yield block.norm1
        yield self.norm_out


@lru_cache(maxsize=4)
def _image_rotation(grid: tuple[int, int], axes_dims: tuple[int, int], device: torch.device) -> Rotation:
    """RoPE by row and column of each token, in row-major order. Cached for requests of the same image size."""
    positions = torch.cartesian_prod(*(torch.arange(size, device=device) for size in grid))
    return rotary_embedding(positions, axes_dims)
