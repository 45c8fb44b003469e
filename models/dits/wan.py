"""The Wan DiT: one stream of video tokens that attends to itself, then to the text (and to an image's tokens).

Shapes: B batch, S video tokens (frames, rows, columns of patches), T text tokens, V vision tokens, D hidden size.
Parameter names are the checkpoint's. The residual stream is in the model's type; norms, modulation and gates compute in
float32, and their weights are kept in it.
"""

# ruff: noqa: N803, N806  (the capitals of a tensor's name are its shape)

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu

from configs.models.dits.wan import WanTransformerConfig
from models.dits.wan_plan import WAN_PLAN
from models.layers.attention import Attention
from models.layers.embeddings import EmbeddingMLP, sinusoidal_embedding
from models.layers.feed_forward import FeedForward
from models.layers.norms import LayerNormScaleShift, RMSNorm
from models.layers.parallelize import parallelize
from models.layers.rotary import Rotation, apply_rotary, rotary_embedding
from models.weights import load_module

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from models.layers.mesh import WorkerMesh

FLOAT32_PARAMETERS = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
"""Parts of parameter names that stay in float32 whatever the model's type, as Diffusers keeps them."""

UNUSED_PARAMETERS = ("norm_added_q",)
"""Published image-to-video checkpoints hold these; nothing reads them."""

IMAGE_NORM_EPS = 1e-5


class FloatLayerNorm(nn.Module):
    """Layer norm with a weight and a bias, computed in float32 whatever the input's type, which the result has."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) to the same."""
        normed = layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x.dtype)


class TextProjection(nn.Module):
    """Two linear layers with GELU (tanh form) between them: (B, T, in_size) to (B, T, D)."""

    def __init__(self, in_size: int, size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_size, size)
        self.linear_2 = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Per token."""
        projected: Tensor = self.linear_2(gelu(self.linear_1(x), approximate="tanh"))
        return projected


class ImageEmbedding(nn.Module):
    """Tokens of the vision encoder (B, V, image_dim) to (B, V, D). With two frames, positions tell them apart."""

    def __init__(self, image_dim: int, size: int, positions: int | None) -> None:
        super().__init__()
        self.norm1 = FloatLayerNorm(image_dim, IMAGE_NORM_EPS)
        self.ff = FeedForward(image_dim, hidden=image_dim, out_size=size, approximate="none")
        self.norm2 = FloatLayerNorm(size, IMAGE_NORM_EPS)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, image_dim)) if positions else None

    def forward(self, x: Tensor) -> Tensor:
        """The tokens of all frames of one video lie behind each other."""
        if self.pos_embed is not None:
            x = x + self.pos_embed
        embedded: Tensor = self.norm2(self.ff(self.norm1(x)))
        return embedded


class ConditionEmbedder(nn.Module):
    """Embeds what the blocks are conditioned on: time, text, and an image's tokens in models that take one."""

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
        """The time embedding (B, D), and the six modulations of a block (B, 6, D), both in the model's type."""
        embedding: Tensor = self.time_embedder(sinusoidal_embedding(timestep_B, self.freq_dim)).to(dtype)
        return embedding, self.time_proj(silu(embedding)).unflatten(1, (6, -1))


class SelfAttention(nn.Module):
    """Video tokens attend to each other; queries and keys are normalised over all heads together, then turned."""

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_size = config.attention_head_dim
        self.to_q = nn.Linear(size, size)
        self.to_k = nn.Linear(size, size)
        self.to_v = nn.Linear(size, size)
        self.to_out = nn.ModuleList([nn.Linear(size, size)])
        self.norm_q = RMSNorm(size, config.eps)
        self.norm_k = RMSNorm(size, config.eps)
        self.attention = Attention()

    def heads(self, x: Tensor) -> Tensor:
        """(B, tokens, D) to (B, tokens, heads, head size)."""
        return x.reshape(*x.shape[:-1], -1, self.head_size)

    def forward(self, x_BSD: Tensor, rotation: Rotation) -> Tensor:
        """(B, S, D) to the same."""
        q = apply_rotary(self.heads(self.norm_q(self.to_q(x_BSD))), rotation)
        k = apply_rotary(self.heads(self.norm_k(self.to_k(x_BSD))), rotation)
        attended: Tensor = self.to_out[0](self.attention(q, k, self.heads(self.to_v(x_BSD))).flatten(2))
        return attended


class CrossAttention(SelfAttention):
    """Video tokens attend to the text and, each softmax for itself, to an image's tokens; the results add up."""

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.add_k_proj = nn.Linear(config.added_kv_proj_dim, size) if config.added_kv_proj_dim else None
        self.add_v_proj = nn.Linear(config.added_kv_proj_dim, size) if config.added_kv_proj_dim else None
        self.norm_added_k = RMSNorm(size, config.eps) if config.added_kv_proj_dim else None

    def cross(self, x_BSD: Tensor, text_BTD: Tensor, image_BVD: Tensor | None) -> Tensor:
        """(B, S, D) to the same. Padding of the text is attended to: it is zero before its embedding."""
        q = self.heads(self.norm_q(self.to_q(x_BSD)))
        k = self.heads(self.norm_k(self.to_k(text_BTD)))
        attended = self.attention(q, k, self.heads(self.to_v(text_BTD))).flatten(2)
        if image_BVD is not None:
            assert self.add_k_proj is not None, "image tokens in a model that takes none"
            assert self.add_v_proj is not None, "image tokens in a model that takes none"
            assert self.norm_added_k is not None, "image tokens in a model that takes none"
            k = self.heads(self.norm_added_k(self.add_k_proj(image_BVD)))
            attended = attended + self.attention(q, k, self.heads(self.add_v_proj(image_BVD))).flatten(2)
        projected: Tensor = self.to_out[0](attended)
        return projected


class WanTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and the last are modulated and gated by time."""

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = LayerNormScaleShift(size, config.eps)
        self.attn1 = SelfAttention(config)
        self.attn2 = CrossAttention(config)
        self.norm2 = FloatLayerNorm(size, config.eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(size, hidden=config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, size))

    def forward(
        self,
        x_BSD: Tensor,
        text_BTD: Tensor,
        image_BVD: Tensor | None,
        modulation_B6D: Tensor,
        rotation: Rotation,
    ) -> Tensor:
        """The next residual stream."""
        dtype = x_BSD.dtype
        modulation = self.scale_shift_table + modulation_B6D.float()
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.unbind(1)
        attended = self.attn1(self.norm(x_BSD.float(), scale, shift).to(dtype), rotation)
        x_BSD = (x_BSD.float() + attended * gate[:, None]).to(dtype)
        x_BSD = x_BSD + self.attn2.cross(self.norm2(x_BSD), text_BTD, image_BVD)
        fed = self.ffn(self.norm(x_BSD.float(), ff_scale, ff_shift).to(dtype))
        result: Tensor = (x_BSD.float() + fed.float() * ff_gate[:, None]).to(dtype)
        return result


class WanTransformer3DModel(nn.Module):
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
        """Velocity (B, out_channels, frames, rows, columns) of hidden_states (B, in_channels, frames, rows, columns).

        timestep is (B,) in [0, 1000]; encoder_hidden_states (B, T, text_dim); encoder_hidden_states_image
        (B, V, image_dim), the tokens of first and last frame behind each other where there are two.
        """
        dtype = hidden_states.dtype
        grid = tuple(size // patch for size, patch in zip(hidden_states.shape[2:], self.patch_size, strict=True))
        rotation = rotary_embedding(_positions(grid, hidden_states.device), self.axes_dims)
        embed = self.condition_embedder
        time_BD, modulation_B6D = embed.time(timestep, encoder_hidden_states.dtype)
        text_BTD = embed.text_embedder(encoder_hidden_states)
        image_BVD = None
        if encoder_hidden_states_image is not None:
            assert embed.image_embedder is not None, "image tokens in a model that takes none"
            image_BVD = embed.image_embedder(encoder_hidden_states_image)
        x_BSD = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        for block in self.blocks:
            x_BSD = block(x_BSD, text_BTD, image_BVD, modulation_B6D, rotation)
        shift, scale = (self.scale_shift_table + time_BD[:, None]).unbind(1)
        return self._unpatchify(self.proj_out(self.final_norm(x_BSD.float(), scale, shift).to(dtype)), grid)

    def _unpatchify(self, patches: Tensor, grid: tuple[int, ...]) -> Tensor:
        """(B, S, channels of a patch) to (B, channels, frames, rows, columns); a patch is (t, y, x, channel)."""
        video = patches.reshape(patches.shape[0], *grid, *self.patch_size, -1)
        return video.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _positions(grid: tuple[int, ...], device: torch.device) -> Tensor:
    """(frame, row, column) of every token, in order; (S, 3)."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in grid))


def load_wan_transformer(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None
) -> WanTransformer3DModel:
    """Build the DiT of the module's config.json, or this rank's part of it, and read its weights.

    Raises CheckpointError, and InvalidInput for a mesh whose degrees do not divide the model.
    """
    config = WanTransformerConfig.from_dict(name, checkpoint.module_config(name))
    with torch.device("meta"):
        model = WanTransformer3DModel(config)
    parallelize(model, WAN_PLAN, mesh, heads=config.num_attention_heads, feed_forward=config.ffn_dim)
    files = checkpoint.weight_files(name)
    load_module(model, name, files, device, dtype, keep_float32=FLOAT32_PARAMETERS, unused=UNUSED_PARAMETERS)
    return model
