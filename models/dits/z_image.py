"""The Z-Image DiT: separate refiner blocks for text and image, then blocks for all tokens.

Shapes: N steps, B batch, T text tokens, I image tokens, S = T + I (text first), C channels of a latent, D hidden size,
E size of the time embedding, M size of all modulations. Text and image are padded with learned tokens, which take part
in attention. Parameter names are the checkpoint's.
"""

# ruff: noqa: N803, N806  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from configs.models.dits.z_image import PATCH, ZImageTransformerConfig
from models.dits.base import DiffusionTransformer, Predictions, Prepared, entry_point
from models.layers.attention import SelfAttention
from models.layers.embeddings import sinusoidal_embedding
from models.layers.feed_forward import GatedFeedForward
from models.layers.linear import Linear, only_linear
from models.layers.norms import LayerNormScaleShift, Residual, RMSNorm, RMSNormScaleShift
from models.layers.rotary import rotary_embedding
from models.layers.step_cache import CacheUse, run_blocks
from models.rotation import Rotation
from models.token_segments import SegmentVectors

SINUSOID_SIZE = 256
"""Size of the sinusoidal embedding of a timestep."""

TIME_HIDDEN_SIZE = 1024
"""Hidden size of the MLP of the time embedding."""

MAX_TIME_SIZE = 256
"""Largest size E of the time embedding."""

QK_EPS = 1e-5
"""Epsilon of the norms of queries and keys."""

FINAL_EPS = 1e-6
"""Epsilon of the last norm."""

VECTORS = 4
"""Number of modulations of a block: scale and gate of attention, then of the feed-forward."""

PATCH_NAME = f"{PATCH}-1"
"""Key of the first and the last projection for patches of 2x2 latents of one frame."""


class TimestepEmbedder(nn.Module):
    """Embedding of a timestep."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(SINUSOID_SIZE, TIME_HIDDEN_SIZE), nn.SiLU(), nn.Linear(TIME_HIDDEN_SIZE, size)
        )

    def forward(self, timesteps_NB: Tensor) -> Tensor:
        """(N, B, E) for timesteps (N, B) in [0, 1000]."""
        sinusoids = sinusoidal_embedding(timesteps_NB.flatten(), SINUSOID_SIZE)
        embedded: Tensor = self.mlp(sinusoids.to(next(self.mlp.parameters()).dtype))
        return embedded.view(*timesteps_NB.shape, -1)


class ZImageAttention(SelfAttention):
    """Self-attention without biases; norms of queries and keys are over each head."""

    def __init__(self, size: int, head_size: int) -> None:
        super().__init__(size, head_size, eps=QK_EPS, has_bias=False)
        self.to_out = nn.ModuleList([Linear(size, size, has_bias=False)])


class ZImageTransformerBlock(nn.Module):
    """Attention, then a SwiGLU feed-forward, each with a norm before and after it, and a gate.

    Each half of the block computes x + gate * norm(f(norm(x) * (1 + scale))). The weights of the norms are folded into
    scale and gate; see vectors().
    """

    def __init__(self, config: ZImageTransformerConfig, *, is_modulated: bool = True) -> None:
        super().__init__()
        size = config.hidden_size
        self.eps = config.eps
        self.attention = ZImageAttention(size, config.attention_head_dim)
        self.feed_forward = GatedFeedForward(size, config.feed_forward_size)
        self.attention_norm1 = RMSNorm(size, config.eps)
        self.ffn_norm1 = RMSNorm(size, config.eps)
        self.attention_norm2 = RMSNorm(size, config.eps)
        self.ffn_norm2 = RMSNorm(size, config.eps)
        self.adaLN_modulation: nn.Module | None = None
        if is_modulated:
            self.adaLN_modulation = nn.Sequential(Linear(_time_size(config), VECTORS * size))
        self.norm = RMSNormScaleShift(size, config.eps)

    def vectors(self, time_NBE: Tensor) -> Tensor:
        """Scale and gate of attention and feed-forward, float32 (N, B, 4 * D), or (4 * D,) without modulation.

        The weights of the norms are folded in.
        """
        norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        weights = [norm.weight.float() for norm in norms]
        if self.adaLN_modulation is None:
            return torch.cat([weights[0] - 1, weights[1], weights[2] - 1, weights[3]])
        parts = self.adaLN_modulation(time_NBE).float().chunk(VECTORS, dim=-1)
        scales = [weight * (1 + scale) - 1 for weight, scale in zip(weights[::2], parts[::2], strict=True)]
        gates = [weight * gate.tanh() for weight, gate in zip(weights[1::2], parts[1::2], strict=True)]
        return torch.cat((scales[0], gates[0], scales[1], gates[1]), dim=-1)

    def forward(
        self, residual: Residual, vectors: Sequence[SegmentVectors], no_shift: SegmentVectors, rotation: Rotation
    ) -> Residual:
        """Return the residual stream after the block. `vectors` are the four modulations, `no_shift` is zeros."""
        scale, gate, ff_scale, ff_gate = vectors
        x_BSD, normed = self.norm.after(residual, scale, no_shift)
        attended = self.attention(normed, rotation)
        residual = Residual(x_BSD, self._normed(only_linear(self.attention.to_out)(attended)), gate)
        x_BSD, normed = self.norm.after(residual, ff_scale, no_shift)
        return Residual(x_BSD, self._normed(self.feed_forward(normed)), ff_gate)

    def _normed(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], eps=self.eps)


class FinalLayer(nn.Module):
    """The last norm, scaled by the time embedding, and the last projection."""

    def __init__(self, config: ZImageTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.linear = nn.Linear(size, PATCH * PATCH * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(_time_size(config), size))
        self.norm = LayerNormScaleShift(size, FINAL_EPS)


class ZImageTransformer2DModel(DiffusionTransformer):
    """Predicts the negated velocity of image latents."""

    def __init__(self, config: ZImageTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.size = size
        self.config = config
        self.all_x_embedder = nn.ModuleDict({PATCH_NAME: nn.Linear(PATCH * PATCH * config.in_channels, size)})
        self.all_final_layer = nn.ModuleDict({PATCH_NAME: FinalLayer(config)})
        refiners = range(config.num_refiner_layers)
        self.noise_refiner = nn.ModuleList(ZImageTransformerBlock(config) for _ in refiners)
        self.context_refiner = nn.ModuleList(ZImageTransformerBlock(config, is_modulated=False) for _ in refiners)
        self.t_embedder = TimestepEmbedder(_time_size(config))
        self.cap_embedder = nn.Sequential(RMSNorm(config.text_size, config.eps), nn.Linear(config.text_size, size))
        self.x_pad_token = nn.Parameter(torch.zeros(1, size))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, size))
        self.layers = nn.ModuleList(ZImageTransformerBlock(config) for _ in range(config.num_layers))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_ids: Tensor,
        image_ids: Tensor,
    ) -> Tensor:
        """Negated velocity (B, C, rows, columns) of hidden_states (B, C, rows, columns).

        - timestep: (B,), from 0 (noise) to 1.
        - encoder_hidden_states: (B, tokens, text_size), without padding.
        - text_ids and image_ids: positions (T, 3) and (I, 3) of all tokens, including padding.
        """
        prepared = self.prepare(timestep[None], encoder_hidden_states, text_ids, image_ids)
        return self.predict(hidden_states, use=None, **prepared.inputs(0))["hidden_states"]

    @entry_point
    def prepare(  # type: ignore[override]  # keywords differ by model
        self, timesteps: Tensor, encoder_hidden_states: Tensor, text_ids: Tensor, image_ids: Tensor
    ) -> Prepared:
        """Modulations (N, B, M) for timesteps (N, B), the refined text (B, T, D), and RoPE of text and image."""
        time_NBE = self.t_embedder(timesteps * self.config.time_scale)
        vectors = [block.vectors(time_NBE) for block in _blocks(self.noise_refiner, self.layers)]
        scale_NBD = self._final_layer.adaLN_modulation(time_NBE).float()
        text, image = (self._rotation(ids) for ids in (text_ids, image_ids))
        return Prepared(
            steps={"modulation": torch.cat([*vectors, scale_NBD, torch.zeros_like(scale_NBD)], dim=-1)},
            constants={
                "text_BTD": self._refined_text(encoder_hidden_states, text, time_NBE),
                "text_cos": text.cos,
                "text_sin": text.sin,
                **image.tensors(),
            },
        )

    @entry_point
    def predict(  # type: ignore[override]  # constants differ by model
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        text_BTD: Tensor,
        text_cos: Tensor,
        text_sin: Tensor,
        cos: Tensor,
        sin: Tensor,
        use: CacheUse | None = None,
    ) -> Predictions:
        """Negated velocity (B, C, rows, columns) of hidden_states, with the modulations (B, M) of a step."""
        rows, columns = hidden_states.shape[2:]
        patches = pack_channels_last(hidden_states)
        embedded: Tensor = self.all_x_embedder[PATCH_NAME](patches)
        refined = self.refine(_padded(embedded, self.x_pad_token, len(cos)), cos, sin, modulation)
        velocity = self.predict_tokens(refined, cos, sin, modulation, text_BTD, text_cos, text_sin, use)
        return {"hidden_states": unpack_channels_last(velocity[:, : patches.shape[1]], rows, columns)}

    @entry_point
    def refine(self, image_BID: Tensor, cos: Tensor, sin: Tensor, modulation: Tensor) -> Tensor:
        """Run the image's refiner blocks on image tokens (B, I, D)."""
        residual, rotation = Residual(image_BID), Rotation(cos, sin)
        *vectors, _, no_shift = self._vectors(modulation)
        for index, block in enumerate(self.noise_refiner):
            residual = block(residual, vectors[VECTORS * index :][:VECTORS], no_shift, rotation)
        return residual.added()

    @entry_point
    def predict_tokens(
        self,
        image_BID: Tensor,
        cos: Tensor,
        sin: Tensor,
        modulation: Tensor,
        text_BTD: Tensor,
        text_cos: Tensor,
        text_sin: Tensor,
        use: CacheUse | None = None,
    ) -> Tensor:
        """Run the blocks after the refiners; returns patches (B, I, 4C) of the negated velocity."""
        rotation = Rotation(torch.cat((text_cos, cos)), torch.cat((text_sin, sin)))
        *vectors, scale, no_shift = self._vectors(modulation)
        vectors = vectors[VECTORS * len(self.noise_refiner) :]
        blocks = [
            partial(block, vectors=vectors[VECTORS * index :][:VECTORS], no_shift=no_shift, rotation=rotation)
            for index, block in enumerate(self.layers)
        ]
        residual = run_blocks(Residual(torch.cat((text_BTD, image_BID), dim=1)), blocks, use)
        _, normed = self._final_layer.norm.after(residual, scale, no_shift)
        velocity: Tensor = self._final_layer.linear(normed[:, text_BTD.shape[1] :])
        return velocity

    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """Number of elements of the residual stream: text and image tokens."""
        tokens = constants["text_BTD"].shape[1] + len(constants["cos"])
        return len(latents["hidden_states"]) * tokens * self.size

    @property
    def _final_layer(self) -> FinalLayer:
        layer = self.all_final_layer[PATCH_NAME]
        assert isinstance(layer, FinalLayer)
        return layer

    def _rotation(self, ids: Tensor) -> Rotation:
        return rotary_embedding(ids, self.config.axes_dims, self.config.rope_theta)

    def _refined_text(self, text: Tensor, rotation: Rotation, time_NBE: Tensor) -> Tensor:
        """Run the text's refiner blocks, which do not depend on the timestep; returns (B, T, D)."""
        embedded = _padded(self.cap_embedder(text.to(self.cap_pad_token.dtype)), self.cap_pad_token, len(rotation.cos))
        residual = Residual(embedded)
        for block in _blocks(self.context_refiner):
            vectors = block.vectors(time_NBE)
            vectors = torch.cat((vectors, vectors.new_zeros(self.size))).expand(len(text), -1)
            *modulations, no_shift = self._vectors(vectors)
            residual = block(residual, modulations, no_shift, rotation)
        return residual.added()

    def _vectors(self, modulation_BM: Tensor) -> list[SegmentVectors]:
        parts = modulation_BM.chunk(modulation_BM.shape[1] // self.size, dim=1)
        return [SegmentVectors.same(part) for part in parts]


def pack_channels_last(raw: Tensor) -> Tensor:
    """Latents (B, C, 2h, 2w) to patches (B, h * w, 4C); the order of a patch's channels is (dy, dx, c)."""
    batch, channels, rows, columns = raw.shape
    patches = raw.reshape(batch, channels, rows // PATCH, PATCH, columns // PATCH, PATCH).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(batch, -1, PATCH * PATCH * channels)


def unpack_channels_last(patches: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of pack_channels_last(): patches (B, h * w, 4C) to latents (B, C, rows, columns)."""
    split = patches.reshape(len(patches), rows // PATCH, columns // PATCH, PATCH, PATCH, -1)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows, columns)


def _padded(x_BSD: Tensor, token_1D: Tensor, length: int) -> Tensor:
    """Tokens (B, S, D), padded at the end with a learned token (1, D) to `length` tokens."""
    batch, tokens, _ = x_BSD.shape
    return torch.cat((x_BSD, token_1D.expand(batch, length - tokens, -1)), dim=1)


def _blocks(*lists: nn.ModuleList) -> Iterable[ZImageTransformerBlock]:
    for blocks in lists:
        for block in blocks:
            assert isinstance(block, ZImageTransformerBlock)
            yield block


def _time_size(config: ZImageTransformerConfig) -> int:
    return min(config.hidden_size, MAX_TIME_SIZE)
