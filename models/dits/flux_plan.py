"""Parallel plan and loader of the Flux DiT."""

from __future__ import annotations

from configs.models.dits.flux import FluxTransformerConfig
from models.dits.flux import FluxTransformer2DModel
from models.dits.loading import TransformerLoader
from models.parallel.plan import GatheredResult, ParallelPlan, ShardedArgument

DOUBLE, SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"

FLUX_PLAN = ParallelPlan(
    column=(
        f"{DOUBLE}.attn.to_[qkv]",
        f"{DOUBLE}.attn.add_[qkv]_proj",
        f"{DOUBLE}.ff.net.0.proj",
        f"{DOUBLE}.ff_context.net.0.proj",
        f"{SINGLE}.attn.to_[qkv]",
        f"{SINGLE}.proj_mlp",
    ),
    row=(
        f"{DOUBLE}.attn.to_out.0",
        f"{DOUBLE}.attn.to_add_out",
        f"{DOUBLE}.ff.net.2",
        f"{DOUBLE}.ff_context.net.2",
        f"{SINGLE}.proj_out",
    ),
    # These layers run once per request but hold 27% of the weights: replicas would use much memory on each rank.
    gathered=(f"{DOUBLE}.norm1.linear", f"{DOUBLE}.norm1_context.linear", f"{SINGLE}.norm.linear"),
    # The inputs are the heads, then the feed-forward, which is four times as wide.
    parts={f"{SINGLE}.proj_out": (1, 4)},
    token_segments={"text": "sharded", "image": "sharded"},
    attention=(f"{DOUBLE}.attn.inner", f"{SINGLE}.attn.inner"),
    sharded_arguments=(
        ShardedArgument("prepare", "encoder_hidden_states", "text"),
        ShardedArgument("prepare", "txt_ids", "text", dim=0),
        ShardedArgument("prepare", "img_ids", "image", dim=0),
        ShardedArgument("predict", "hidden_states", "image"),
    ),
    gathered_results=(GatheredResult("predict", "image", result="hidden_states"),),
)

load_flux_transformer = TransformerLoader(
    config=FluxTransformerConfig,
    build=FluxTransformer2DModel,
    plan=FLUX_PLAN,
    heads=lambda config: config.num_attention_heads,
)
