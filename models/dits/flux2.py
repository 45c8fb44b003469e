"""The FLUX.2 DiT: blocks with separate weights for text and image, then blocks with shared weights.

Shapes: N steps, B batch, T text tokens, I image tokens (the output image, then each reference image),
S = T + I (text first), D hidden size, M size of all modulations. Parameter names are the checkpoint's. No projection
has a bias. All blocks of one kind have the same modulations.
"""

# ruff: noqa: N803, N806  (a tensor name ends in its shape, in capitals)

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from configs.models.dits.flux2 import MLP_RATIO, Flux2TransformerConfig
from models.dits.base import DiffusionTransformer, Predictions, Prepared, entry_point
from models.dits.joint_blocks import image_modulations, joint_residual_elements, run_modulated_blocks
from models.kernels.activation import gate_by_silu
from models.kernels.qk_norm_rotate import split_heads
from models.layers.attention import Attention
from models.layers.embeddings import EmbeddingMLP, sinusoidal_embedding
from models.layers.joint_attention import ImageModulation, JointAttention, block_modulations, joint_block
from models.layers.linear import Linear
from models.layers.norms import LayerNormScaleShift, Residual, RMSNorm
from models.layers.qk_norm import ProjectedHeads, QKNormModules
from models.layers.rotary import rotary_embedding
from models.layers.step_cache import CacheUse
from models.rotation import Rotation
from models.token_segments import SegmentVectors, TokenSegments

DOUBLE_VECTORS = 12
"""Number of modulations of a block with separate weights: six for the image, then six for the text.

The six are shift, scale and gate of attention, then of the feed-forward.
"""

SINGLE_VECTORS = 3
"""Number of modulations of a block with shared weights: shift, scale and gate."""

FINAL_VECTORS = 2
"""Number of modulations of the last norm: scale and shift."""


class Flux2ModulationLinear(nn.Module):
    """Projection of the activated conditioning vector (B, D) to modulations (B, parts * D)."""

    def __init__(self, size: int, parts: int) -> None:
        super().__init__()
        self.linear = Linear(size, parts * size, has_bias=False)


class Flux2ConditioningEmbedding(nn.Module):
    """Conditioning vector (B, D): the sum of embedded timestep and guidance (guidance-distilled models)."""

    def __init__(self, config: Flux2TransformerConfig) -> None:
        super().__init__()
        self.sinusoid_size, size = config.sinusoid_size, config.hidden_size
        self.timestep_embedder = EmbeddingMLP(self.sinusoid_size, size, has_bias=False)
        self.guidance_embedder: EmbeddingMLP | None = None
        if config.guidance_embeds:
            self.guidance_embedder = EmbeddingMLP(self.sinusoid_size, size, has_bias=False)

    def forward(self, timestep_B: Tensor, guidance_B: Tensor | None) -> Tensor:
        """Embed timestep (B,) and guidance (B,), both float32; both are multiplied by 1000 here."""
        embedding: Tensor = self.timestep_embedder(sinusoidal_embedding(timestep_B * 1000, self.sinusoid_size))
        if self.guidance_embedder is None or guidance_B is None:
            return embedding
        guidance: Tensor = self.guidance_embedder(sinusoidal_embedding(guidance_B * 1000, self.sinusoid_size))
        return embedding + guidance


class Flux2FeedForward(nn.Module):
    """Feed-forward with SwiGLU. The first projection computes SwiGLU's gate and input in one GEMM."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear_in = Linear(size, 2 * MLP_RATIO * size, has_bias=False)
        self.linear_out = Linear(MLP_RATIO * size, size, has_bias=False)

    def into(self, x: Tensor, out: Tensor) -> None:
        """Write the result (B, tokens, D) of x (B, tokens, D) into `out`."""
        hidden = x.new_empty(*x.shape[:2], len(self.linear_in.weight))
        self.linear_in.into(x, hidden)
        self.linear_out.into(gate_by_silu(hidden), out)


class Flux2ParallelSelfAttention(nn.Module):
    """Parallel attention and SwiGLU.

    One projection computes the inputs of both, and one projection combines their results.
    """

    def __init__(self, size: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.to_qkv_mlp_proj = Linear(size, (3 + 2 * MLP_RATIO) * size, has_bias=False)
        self.norm_q = RMSNorm(head_size)
        self.norm_k = RMSNorm(head_size)
        self.inner = Attention()
        self.to_out = Linear((1 + MLP_RATIO) * size, size, has_bias=False)

    def forward(self, x_BSD: Tensor, rotation: Rotation) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        # The size follows from the weight, because a sharded layer has fewer heads than the config states.
        size = len(self.to_qkv_mlp_proj.weight) // (3 + 2 * MLP_RATIO)
        projected = x_BSD.new_empty(*x_BSD.shape[:2], (3 + 2 * MLP_RATIO) * size)
        self.to_qkv_mlp_proj.into(x_BSD, projected)
        qkv, hidden = projected[..., : 3 * size], projected[..., 3 * size :]
        norms = QKNormModules((self.norm_q, self.norm_k), self.head_size)
        pending = self.inner.start(ProjectedHeads(qkv, norms, rotation))
        both = x_BSD.new_empty(*x_BSD.shape[:2], (1 + MLP_RATIO) * size)
        both[..., size:] = gate_by_silu(hidden)
        self.inner.finish(pending, split_heads(both[..., :size], self.head_size))
        result: Tensor = self.to_out(both)
        return result


class Flux2TransformerBlock(nn.Module):
    """Joint attention of text and image, then one feed-forward for each of the two."""

    def __init__(self, config: Flux2TransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = LayerNormScaleShift(size)
        self.attn = JointAttention(size, config.attention_head_dim, has_bias=False)
        self.ff = Flux2FeedForward(size)
        self.ff_context = Flux2FeedForward(size)

    def forward(
        self, residual: Residual, modulations: Iterator[ImageModulation], rotation: Rotation, segments: TokenSegments
    ) -> Residual:
        """Return the residual stream after the block. Takes the next twelve of `modulations`."""
        halves = block_modulations(segments, modulations)
        return joint_block(residual, self.norm, self.attn, (self.ff_context, self.ff), halves, rotation, segments)


class Flux2SingleTransformerBlock(nn.Module):
    """Block with the same weights for all tokens: parallel attention and feed-forward."""

    def __init__(self, config: Flux2TransformerConfig) -> None:
        super().__init__()
        self.norm = LayerNormScaleShift(config.hidden_size)
        self.attn = Flux2ParallelSelfAttention(config.hidden_size, config.attention_head_dim)

    def forward(
        self, residual: Residual, modulations: Iterator[ImageModulation], rotation: Rotation, segments: TokenSegments
    ) -> Residual:
        """Return the residual stream after the block.

        Takes the next three of `modulations`; all segments have the same modulations.
        """
        del segments
        shift, scale, gate = (SegmentVectors.same(each[0]) for each in islice(modulations, SINGLE_VECTORS))
        x_BSD, normed = self.norm.after(residual, scale, shift)
        return Residual(x_BSD, self.attn(normed, rotation), gate)


class Flux2Transformer2DModel(DiffusionTransformer):
    """Predicts the velocity of packed latents."""

    def __init__(self, config: Flux2TransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.axes_dims, self.theta = config.axes_dims_rope, config.rope_theta
        self.time_guidance_embed = Flux2ConditioningEmbedding(config)
        self.double_stream_modulation_img = Flux2ModulationLinear(size, DOUBLE_VECTORS // 2)
        self.double_stream_modulation_txt = Flux2ModulationLinear(size, DOUBLE_VECTORS // 2)
        self.single_stream_modulation = Flux2ModulationLinear(size, SINGLE_VECTORS)
        self.x_embedder = Linear(config.in_channels, size, has_bias=False)
        self.context_embedder = Linear(config.joint_attention_dim, size, has_bias=False)
        self.transformer_blocks = nn.ModuleList(Flux2TransformerBlock(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            Flux2SingleTransformerBlock(config) for _ in range(config.num_single_layers)
        )
        self.norm_out = Flux2ModulationLinear(size, FINAL_VECTORS)
        self.final_norm = LayerNormScaleShift(size)
        self.proj_out = nn.Linear(size, config.out_channels, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, I, channels) of hidden_states (B, I, channels), including reference tokens.

        - timestep: float32 (B,) in [0, 1].
        - guidance: float32 (B,), or None for models without a guidance embedding.
        - encoder_hidden_states: (B, T, joint_attention_dim).
        - img_ids and txt_ids: positions (I, 4) and (T, 4).
        """
        prepared = self.prepare(timestep[None], encoder_hidden_states, guidance, img_ids=img_ids, txt_ids=txt_ids)
        return self.predict(hidden_states, use=None, **prepared.inputs(0))["hidden_states"]

    @entry_point
    def prepare(  # type: ignore[override]  # keywords differ by model
        self,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        guidance: Tensor | None,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> Prepared:
        """Modulations (N, B, M) for timesteps (N, B), embedded text (B, T, D), and RoPE of all tokens."""
        steps, batch = timesteps.shape
        repeated = None if guidance is None else guidance.repeat(steps)
        activated_BD = silu(self.time_guidance_embed(timesteps.flatten(), repeated))
        layers = (
            self.double_stream_modulation_img,
            self.double_stream_modulation_txt,
            self.single_stream_modulation,
            self.norm_out,
        )
        modulations = torch.cat([each.linear(activated_BD) for each in layers], dim=1)
        rotation = rotary_embedding(torch.cat((txt_ids, img_ids)), self.axes_dims, self.theta)
        return Prepared(
            steps={"modulation": modulations.view(steps, batch, -1)},
            constants={"text_BTD": self.context_embedder(encoder_hidden_states), **rotation.tensors()},
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
        vectors = modulation.chunk(DOUBLE_VECTORS + SINGLE_VECTORS + FINAL_VECTORS, dim=1)
        double, rest = vectors[:DOUBLE_VECTORS], vectors[DOUBLE_VECTORS:]
        single, final = rest[:SINGLE_VECTORS], rest[SINGLE_VECTORS:]
        vectors = double * len(self.transformer_blocks) + single * len(self.single_transformer_blocks) + final
        modulations = image_modulations(vectors)
        blocks = (*self.transformer_blocks, *self.single_transformer_blocks)
        normed = run_modulated_blocks(
            self.x_embedder(hidden_states), text_BTD, modulations, Rotation(cos, sin), blocks, self.final_norm, use
        )
        return {"hidden_states": self.proj_out(normed)}

    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """Number of elements of the residual stream: text and image tokens."""
        return joint_residual_elements(latents["hidden_states"], constants["text_BTD"])
