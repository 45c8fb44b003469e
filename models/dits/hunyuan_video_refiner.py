"""HunyuanVideo's token refiner: refines the text tokens for each timestep.

Shapes: R rows (steps x batch), T text tokens, D hidden size.
"""

# ruff: noqa: N803, N806  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.nn.functional import silu

from configs.models.dits.hunyuan_video import HunyuanVideoTransformerConfig
from models.dits.flux import FluxConditioningEmbedding
from models.kernels.qk_norm_rotate import split_heads
from models.layers.attention import Attention
from models.layers.feed_forward import FeedForward
from models.layers.linear import Linear, only_linear

EPS = 1e-6


class RefinerAttention(nn.Module):
    """Self-attention of text tokens, without norms of queries and keys and without RoPE."""

    def __init__(self, size: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.to_q = Linear(size, size)
        self.to_k = Linear(size, size)
        self.to_v = Linear(size, size)
        self.to_out = nn.ModuleList([Linear(size, size)])
        self.inner = Attention()

    def forward(self, x_RTD: Tensor) -> Tensor:
        """(R, T, D) to (R, T, D)."""
        heads = (split_heads(each(x_RTD), self.head_size) for each in (self.to_q, self.to_k, self.to_v))
        attended: Tensor = self.inner(*heads).flatten(2)
        projected: Tensor = only_linear(self.to_out)(attended)
        return projected


class GateLinear(nn.Module):
    """Projection of the time embedding to the gates of a block's two halves."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = Linear(size, 2 * size)

    def forward(self, time_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Two gates (R, 1, D) from the time embedding (R, D)."""
        first, second = self.linear(silu(time_RD))[:, None].chunk(2, dim=-1)
        return first, second


class RefinerBlock(nn.Module):
    """Attention, then a feed-forward; both are gated by the time embedding."""

    def __init__(self, size: int, head_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size, EPS)
        self.attn = RefinerAttention(size, head_size)
        self.norm2 = nn.LayerNorm(size, EPS)
        self.ff = FeedForward(size, activation="silu")
        self.norm_out = GateLinear(size)

    def forward(self, x_RTD: Tensor, time_RD: Tensor) -> Tensor:
        """(R, T, D) to (R, T, D)."""
        gate, ff_gate = self.norm_out(time_RD)
        x_RTD = x_RTD + self.attn(self.norm1(x_RTD)) * gate
        refined: Tensor = x_RTD + self.ff(self.norm2(x_RTD)) * ff_gate
        return refined


class RefinerBlocks(nn.Module):
    """The list of refiner blocks. The class adds the level `refiner_blocks` of the checkpoint's parameter names."""

    def __init__(self, config: HunyuanVideoTransformerConfig) -> None:
        super().__init__()
        self.refiner_blocks = nn.ModuleList(
            RefinerBlock(config.hidden_size, config.attention_head_dim) for _ in range(config.num_refiner_layers)
        )


class TokenRefiner(nn.Module):
    """Refines text embeddings of the language model, once for each timestep."""

    def __init__(self, config: HunyuanVideoTransformerConfig) -> None:
        super().__init__()
        sizes = replace(config.blocks, pooled_projection_dim=config.text_embed_dim, guidance_embeds=False)
        self.time_text_embed = FluxConditioningEmbedding(sizes, time_scale=1.0)
        self.proj_in = nn.Linear(config.text_embed_dim, config.hidden_size)
        self.token_refiner = RefinerBlocks(config)

    def forward(self, text_BTE: Tensor, timesteps_NB: Tensor) -> Tensor:
        """(N, B, T, D) for text (B, T, text_embed_dim) without padding, and timesteps (N, B) in [0, 1000]."""
        steps, batch = timesteps_NB.shape
        pooled = text_BTE.float().mean(dim=1).to(text_BTE.dtype)
        time_RD = self.time_text_embed(timesteps_NB.flatten(), None, pooled.repeat(steps, 1))
        x_RTD: Tensor = self.proj_in(text_BTE).repeat(steps, 1, 1)
        for block in self.token_refiner.refiner_blocks:
            x_RTD = block(x_RTD, time_RD)
        return x_RTD.view(steps, batch, *x_RTD.shape[1:])
