"""Parallel plan and loader of the Wan DiT."""

from __future__ import annotations

from configs.models.dits.wan import WanTransformerConfig
from models.dits.loading import TransformerLoader
from models.dits.wan import FIRST_FRAME, FLOAT32_PARAMETERS, UNUSED_PARAMETERS, VIDEO, WanTransformer3DModel
from models.parallel.plan import GatheredResult, ParallelPlan, ShardedArgument

BLOCK = "blocks.*"

WAN_PLAN = ParallelPlan(
    # attn2 is cross-attention to text and image, which are replicated; a rank computes it for its heads and tokens.
    column=(f"{BLOCK}.attn[12].to_[qkv]", f"{BLOCK}.attn2.add_[kv]_proj", f"{BLOCK}.ffn.net.0.proj"),
    row=(f"{BLOCK}.attn[12].to_out.0", f"{BLOCK}.ffn.net.2"),
    norms=(f"{BLOCK}.attn[12].norm_[qk]", f"{BLOCK}.attn2.norm_added_k"),
    token_segments={VIDEO: "sharded", FIRST_FRAME: "sharded", "text": "replicated", "image": "replicated"},
    attention=(f"{BLOCK}.attn1.inner",),
    sharded_arguments=(
        ShardedArgument("predict_tokens", "x_BSD", VIDEO),
        ShardedArgument("predict_tokens", "cos", VIDEO, dim=0),
        ShardedArgument("predict_tokens", "sin", VIDEO, dim=0),
        # A first frame with a separate timestep is a separate segment: each rank has a chunk of both segments.
        ShardedArgument("predict_tokens", "first_BSD", FIRST_FRAME),
        ShardedArgument("predict_tokens", "first_cos", FIRST_FRAME, dim=0),
        ShardedArgument("predict_tokens", "first_sin", FIRST_FRAME, dim=0),
    ),
    gathered_results=(
        GatheredResult("predict_tokens", VIDEO, result=VIDEO),
        GatheredResult("predict_tokens", FIRST_FRAME, result=FIRST_FRAME),
    ),
)

load_wan_transformer = TransformerLoader(
    config=WanTransformerConfig,
    build=WanTransformer3DModel,
    plan=WAN_PLAN,
    heads=lambda config: config.num_attention_heads,
    feed_forward=lambda config: config.ffn_dim,
    keep_float32=FLOAT32_PARAMETERS,
    unused=UNUSED_PARAMETERS,
)
