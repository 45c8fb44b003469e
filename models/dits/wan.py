"""The Wan DiT: self-attention of video tokens, then cross-attention to text and, optionally, images.

Shapes: N steps, B batch, S video tokens (frames, rows, columns of patches), T text tokens, V vision tokens, D hidden
size. Parameter names are the checkpoint's. The residual stream is in the model's dtype; norms, modulation and gates
are computed in float32. FLOAT32_PARAMETERS are also stored in float32.

In Wan 2.2 TI2V the first latent frame is the input image, and its tokens have a separate timestep: they are the first
of two token segments.
"""

# ruff: noqa: N803, N806  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from configs.models.dits.wan import WanTransformerConfig
from models.dits.base import DiffusionTransformer, Predictions, Prepared, entry_point
from models.layers.attention import KeyValueCache, SelfAttention
from models.layers.cross_attention import CrossAttention
from models.layers.embeddings import EmbeddingMLP, TextProjection, sinusoidal_embedding
from models.layers.feed_forward import FeedForward
from models.layers.linear import Linear, only_linear
from models.layers.norms import LayerNormScaleShift, Residual, RMSNorm
from models.layers.rotary import rotary_embedding
from models.layers.step_cache import CacheUse, run_blocks
from models.rotation import Rotation
from models.token_segments import SegmentVectors, TokenSegments, vectors_of_rows

FLOAT32_PARAMETERS = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
"""Substrings of the names of parameters that stay in float32 for any dtype, as in Diffusers."""

UNUSED_PARAMETERS = ("norm_added_q",)
"""Substrings of the names of weights that no module reads; image-to-video checkpoints contain them."""

IMAGE_NORM_EPS = 1e-5
"""Epsilon of the norms of the image embedding."""

VIDEO, FIRST_FRAME = "video", "first_frame"
"""Token segments with separate timesteps; keys of the result of predict_tokens()."""


class FP32LayerNorm(nn.Module):
    """Layer norm with weight and bias, computed in float32; the result is in the dtype of the input."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) to (..., size)."""
        normed = layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x.dtype)


class ImageEmbedding(nn.Module):
    """Embedding of the vision encoder's tokens. A learned position embedding distinguishes first and last frame."""

    def __init__(self, image_dim: int, size: int, positions: int | None) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(image_dim, IMAGE_NORM_EPS)
        self.ff = FeedForward(image_dim, hidden=image_dim, out_size=size, activation="gelu")
        self.norm2 = FP32LayerNorm(size, IMAGE_NORM_EPS)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, image_dim)) if positions else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, V, image_dim) to (B, V, D). The V tokens of first and last frame are concatenated."""
        if self.pos_embed is not None:
            x = x + self.pos_embed
        embedded: Tensor = self.norm2(self.ff(self.norm1(x)))
        return embedded


class ConditionEmbedder(nn.Module):
    """Embeddings of the blocks' conditioning: timestep, text, and image tokens in image-to-video models."""

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.freq_dim = config.freq_dim
        self.time_embedder = EmbeddingMLP(config.freq_dim, size)
        self.time_proj = nn.Linear(size, 6 * size)
        self.text_embedder = TextProjection(config.text_dim, size)
        self.image_embedder = (
            ImageEmbedding(config.image_dim, size, config.pos_embed_seq_len) if config.image_dim else None
        )

    def time(self, timestep_B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The time embedding (B, D), and the six modulations of a block (B, 6, D), both in `dtype`."""
        embedding: Tensor = self.time_embedder(sinusoidal_embedding(timestep_B, self.freq_dim)).to(dtype)
        return embedding, self.time_proj(silu(embedding)).unflatten(1, (6, -1))


class VideoAttention(SelfAttention):
    """Self-attention of video tokens; norms of queries and keys are over all heads together."""

    def __init__(self, config: WanTransformerConfig) -> None:
        size = config.hidden_size
        super().__init__(size, config.attention_head_dim, norm_size=size, eps=config.eps)
        self.to_out = nn.ModuleList([Linear(size, size)])


class WanCrossAttention(CrossAttention):
    """Cross-attention to the text and to image tokens: the sum of two separate attentions.

    Attention includes the padding of the text, which is zeros before the text embedding.
    """

    def __init__(self, config: WanTransformerConfig) -> None:
        size, image_size = config.hidden_size, config.added_kv_proj_dim
        super().__init__(size, config.attention_head_dim, config.eps)
        self.add_k_proj = Linear(image_size, size) if image_size else None
        self.add_v_proj = Linear(image_size, size) if image_size else None
        self.norm_added_k = RMSNorm(size, config.eps) if image_size else None

    def image_keys_and_values(self, image_BVD: Tensor) -> Tensor:
        """Keys, then values, of image tokens (B, V, D): (B, V, 2 * D)."""
        assert self.add_k_proj is not None, "image tokens for a model without an image input"
        assert self.add_v_proj is not None, "image tokens for a model without an image input"
        assert self.norm_added_k is not None, "image tokens for a model without an image input"
        return self.project_keys_and_values(image_BVD, self.add_k_proj, self.add_v_proj, self.norm_added_k)

    def forward(self, x_BSD: Tensor, text_kv: Tensor, image_kv: Tensor | None = None) -> Tensor:
        """Attention output (B, S, D), without the output projection."""
        q = self.queries(x_BSD)
        attended = self.attend(q, text_kv)
        if image_kv is not None:
            attended = attended + self.attend(q, image_kv)
        return attended


class WanTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and the last are modulated and gated."""

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = LayerNormScaleShift(size, config.eps)
        self.attn1 = VideoAttention(config)
        self.attn2 = WanCrossAttention(config)
        self.norm2 = FP32LayerNorm(size, config.eps) if config.cross_attn_norm else None
        self.ffn = FeedForward(size, hidden=config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, size))

    def forward(
        self,
        residual: Residual,
        modulation: Sequence[SegmentVectors],
        text_kv: Tensor,
        image_kv: Tensor | None,
        rotation: Rotation,
        cache: KeyValueCache | None = None,
    ) -> Residual:
        """Return the residual stream after the block.

        The six modulations are float32. `cache` is the KV cache of self-attention.
        """
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation
        x_BSD, normed = self.norm.after(residual, scale, shift)
        attended = self.attn1(normed, rotation, cache=cache)
        residual = only_linear(self.attn1.to_out).add_gated(x_BSD, attended, gate)
        x_BSD, normed = self._cross_norm(residual)
        one = SegmentVectors.same(torch.ones_like(gate.last))
        residual = only_linear(self.attn2.to_out).add_gated(x_BSD, self.attn2(normed, text_kv, image_kv), one)
        x_BSD, normed = self.norm.after(residual, ff_scale, ff_shift)
        ff_out = normed.new_empty(normed.shape)
        self.ffn.into(normed, ff_out)
        return Residual(x_BSD, ff_out, ff_gate)

    def _cross_norm(self, residual: Residual) -> tuple[Tensor, Tensor]:
        """Value of the residual stream, and norm2 of the value. Weight and bias of norm2 become scale and shift."""
        if self.norm2 is None:
            x_BSD = residual.added()
            return x_BSD, x_BSD
        batch = len(residual.x)
        scale, shift = ((each.float()).expand(batch, -1) for each in (self.norm2.weight - 1, self.norm2.bias))
        return self.norm.after(residual, SegmentVectors.same(scale), SegmentVectors.same(shift))


class WanTransformer3DModel(DiffusionTransformer):
    """Predicts the velocity of video latents."""

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.patch_size = config.patch_size
        self.axes_dims = config.axes_dims_rope
        self.patch_embedding = nn.Conv3d(config.in_channels, size, config.patch_size, stride=config.patch_size)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(WanTransformerBlock(config) for _ in range(config.num_layers))
        self.final_norm = LayerNormScaleShift(size, config.eps)
        self.proj_out = nn.Linear(size, config.out_channels * math.prod(config.patch_size))
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, size))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, out_channels, frames, rows, columns) of hidden_states with in_channels channels.

        - timestep: (B,) in [0, 1000], or (B, 2): the first latent frame's timestep, then the other frames' timestep.
        - encoder_hidden_states: (B, T, text_dim).
        - encoder_hidden_states_image: (B, V, image_dim). Tokens of a first and a last frame are concatenated.
        """
        prepared = self.prepare(timestep[None], encoder_hidden_states, encoder_hidden_states_image)
        return self.predict(hidden_states, use=None, **prepared.inputs(0))["hidden_states"]

    @entry_point
    def prepare(  # type: ignore[override]  # keywords differ by model
        self,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
    ) -> Prepared:
        """Float32 modulations (N, B, 6 * blocks + 2, D) for timesteps (N, B); keys and values of text, image.

        For timesteps (N, B, 2) of two segments, "first_modulation" is for the first latent frame, and "modulation" for
        the other frames. Keys and values are (blocks, B, T, 2 * D) for the text and (blocks, B, V, 2 * D) for the
        image.
        """
        embed = self.condition_embedder
        segments = timesteps.unbind(-1) if timesteps.ndim == 3 else (timesteps,)
        names = ("first_modulation", "modulation")[-len(segments) :]
        dtype = encoder_hidden_states.dtype
        steps = {name: self._modulation(each, dtype) for name, each in zip(names, segments, strict=True)}
        text_BTD = embed.text_embedder(encoder_hidden_states)
        cross = [block.attn2 for block in self._blocks()]
        constants = {"text_kv": torch.stack([each.keys_and_values(text_BTD) for each in cross])}
        if encoder_hidden_states_image is not None:
            assert embed.image_embedder is not None, "image tokens for a model without an image input"
            image_BVD = embed.image_embedder(encoder_hidden_states_image)
            constants["image_kv"] = torch.stack([each.image_keys_and_values(image_BVD) for each in cross])
        return Prepared(steps, constants)

    def _modulation(self, timesteps_NB: Tensor, dtype: torch.dtype) -> Tensor:
        """Six modulations of each block, then two of the last norm: (N, B, 6 * blocks + 2, D), float32."""
        time_BD, modulation_B6D = self.condition_embedder.time(timesteps_NB.flatten(), dtype)
        tables = [block.scale_shift_table + modulation_B6D.float() for block in self._blocks()]
        last = self.scale_shift_table + time_BD[:, None]
        rows = torch.cat((*tables, last.float()), dim=1)
        return rows.view(*timesteps_NB.shape, *rows.shape[1:])

    @entry_point
    def predict(  # type: ignore[override]  # constants differ by model
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        text_kv: Tensor,
        image_kv: Tensor | None = None,
        first_modulation: Tensor | None = None,
        use: CacheUse | None = None,
    ) -> Predictions:
        """Velocity (B, out_channels, frames, rows, columns) at a step with modulations (B, 6 * blocks + 2, D).

        `first_modulation` is for the first latent frame; None: `modulation` is for all frames.
        """
        grid, rotation = self._grid(hidden_states), self._rotation(hidden_states)
        x_BSD = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2)
        if first_modulation is None:
            x_BSD = x_BSD.contiguous()
            segments = self.predict_tokens(x_BSD, rotation.cos, rotation.sin, modulation, text_kv, image_kv, use=use)
            return {"hidden_states": self._unpatchify(segments[VIDEO], grid)}
        assert self.patch_size[0] == 1, "a patch of several frames has no single timestep"
        first, rest = slice(0, math.prod(grid[1:])), slice(math.prod(grid[1:]), None)
        segments = self.predict_tokens(
            x_BSD[:, rest],
            rotation.cos[rest],
            rotation.sin[rest],
            modulation,
            text_kv,
            image_kv,
            first_BSD=x_BSD[:, first],
            first_cos=rotation.cos[first],
            first_sin=rotation.sin[first],
            first_modulation=first_modulation,
            use=use,
        )
        patches = torch.cat((segments[FIRST_FRAME], segments[VIDEO]), dim=1)
        return {"hidden_states": self._unpatchify(patches, grid)}

    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """Number of elements of the residual stream: video tokens."""
        del constants
        video = latents["hidden_states"]
        return len(video) * math.prod(self._grid(video)) * self.final_norm.size

    def cached_tensors(self, latents: Mapping[str, Tensor]) -> Rotation | None:
        """RoPE of the video tokens."""
        return self._rotation(latents["hidden_states"])

    def _rotation(self, hidden_states: Tensor) -> Rotation:
        return _rotation(self._grid(hidden_states), self.axes_dims, hidden_states.device)

    def _grid(self, hidden_states: Tensor) -> tuple[int, ...]:
        """Numbers of frames, rows and columns of patches."""
        return tuple(size // patch for size, patch in zip(hidden_states.shape[2:], self.patch_size, strict=True))

    @entry_point
    def predict_tokens(
        self,
        x_BSD: Tensor,
        cos: Tensor,
        sin: Tensor,
        modulation: Tensor,
        text_kv: Tensor,
        image_kv: Tensor | None,
        first_BSD: Tensor | None = None,
        first_cos: Tensor | None = None,
        first_sin: Tensor | None = None,
        first_modulation: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
        use: CacheUse | None = None,
    ) -> dict[str, Tensor]:
        """Run all blocks, the last norm and the projection on embedded tokens (B, S, D).

        The `first_` arguments are for a first frame with a separate timestep. `caches` has a KV cache for each block.
        Returns patches (B, tokens, channels of a patch) by segment: "video", and "first_frame" if there is one.
        """
        segments = None if first_BSD is None else TokenSegments((first_BSD.shape[1], x_BSD.shape[1]))
        x_BSD = _concatenated(first_BSD, x_BSD, dim=1)
        rotation = Rotation(_concatenated(first_cos, cos, dim=0), _concatenated(first_sin, sin, dim=0))
        vectors = vectors_of_rows(segments, first_modulation, modulation)
        blocks = [
            partial(
                block,
                modulation=vectors[6 * index : 6 * index + 6],
                text_kv=text_kv[index],
                image_kv=None if image_kv is None else image_kv[index],
                rotation=rotation,
                cache=None if caches is None else caches[index],
            )
            for index, block in enumerate(self._blocks())
        ]
        residual = run_blocks(Residual(x_BSD), blocks, use)
        shift, scale = vectors[-2:]
        _, normed = self.final_norm.after(residual, scale, shift)
        patches: Tensor = self.proj_out(normed)
        if segments is None:
            return {VIDEO: patches}
        first, video = segments.slices()
        return {FIRST_FRAME: patches[:, first], VIDEO: patches[:, video]}

    def _blocks(self) -> Iterator[WanTransformerBlock]:
        for block in self.blocks:
            assert isinstance(block, WanTransformerBlock)
            yield block

    def _unpatchify(self, patches: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Patches (B, S, t * y * x * channels) to (B, channels, frames, rows, columns)."""
        video = patches.reshape(patches.shape[0], *grid, *self.patch_size, -1)
        return video.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _concatenated(first: Tensor | None, rest: Tensor, dim: int) -> Tensor:
    """Both segments, concatenated along `dim`; without a first segment, `rest` itself, without a copy."""
    return rest if first is None else torch.cat((first, rest), dim)


@lru_cache(maxsize=4)
def _rotation(grid: tuple[int, ...], axes_dims: tuple[int, ...], device: torch.device) -> Rotation:
    """RoPE by frame, row and column of each token, in this order. Cached for requests of the same size."""
    positions = torch.cartesian_prod(*(torch.arange(size, device=device) for size in grid))
    return rotary_embedding(positions, axes_dims)
