"""Parallel plan and loader of the FLUX.2 DiT."""

from __future__ import annotations

from configs.models.dits.flux2 import MLP_RATIO, Flux2TransformerConfig
from models.dits.flux2 import Flux2Transformer2DModel
from models.dits.flux_plan import DOUBLE, FLUX_PLAN, SINGLE
from models.dits.loading import TransformerLoader
from models.parallel.plan import ParallelPlan

FLUX2_PLAN = ParallelPlan(
    column=(
        f"{DOUBLE}.attn.to_[qkv]",
        f"{DOUBLE}.attn.add_[qkv]_proj",
        f"{DOUBLE}.ff.linear_in",
        f"{DOUBLE}.ff_context.linear_in",
        f"{SINGLE}.attn.to_qkv_mlp_proj",
    ),
    row=(
        f"{DOUBLE}.attn.to_out.0",
        f"{DOUBLE}.attn.to_add_out",
        f"{DOUBLE}.ff.linear_out",
        f"{DOUBLE}.ff_context.linear_out",
        f"{SINGLE}.attn.to_out",
    ),
    gathered=("double_stream_modulation_*.linear", "single_stream_modulation.linear"),
    parts={
        # SwiGLU's gate, then its input.
        f"{DOUBLE}.ff.linear_in": (1, 1),
        f"{DOUBLE}.ff_context.linear_in": (1, 1),
        # Queries, keys, values, then SwiGLU's gate and its input.
        f"{SINGLE}.attn.to_qkv_mlp_proj": (1, 1, 1, MLP_RATIO, MLP_RATIO),
        # The heads, then the feed-forward.
        f"{SINGLE}.attn.to_out": (1, MLP_RATIO),
    },
    # The image segment contains the tokens of the output image, then the tokens of each reference image.
    token_segments=FLUX_PLAN.token_segments,
    attention=FLUX_PLAN.attention,
    sharded_arguments=FLUX_PLAN.sharded_arguments,
    gathered_results=FLUX_PLAN.gathered_results,
)

load_flux2_transformer = TransformerLoader(
    config=Flux2TransformerConfig,
    build=Flux2Transformer2DModel,
    plan=FLUX2_PLAN,
    heads=lambda config: config.num_attention_heads,
)
