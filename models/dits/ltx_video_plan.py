"""Parallel plan and loader of the LTX-Video DiT."""

from __future__ import annotations

from configs.models.dits.ltx_video import LTXVideoTransformerConfig
from models.dits.loading import TransformerLoader
from models.dits.ltx_video import FIRST_FRAME, VIDEO, LTXVideoTransformer3DModel
from models.parallel.plan import GatheredResult, ParallelPlan, ShardedArgument

BLOCK = "transformer_blocks.*"

LTX_VIDEO_PLAN = ParallelPlan(
    # attn2 is cross-attention to the text, which is replicated; a rank computes it for its heads and tokens.
    column=(f"{BLOCK}.attn[12].to_[qkv]", f"{BLOCK}.ff.net.0.proj"),
    row=(f"{BLOCK}.attn[12].to_out.0", f"{BLOCK}.ff.net.2"),
    norms=(f"{BLOCK}.attn[12].norm_[qk]",),
    select_heads=(f"{BLOCK}.attn1.select_heads",),
    token_segments={VIDEO: "sharded", FIRST_FRAME: "sharded", "text": "replicated"},
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

load_ltx_video_transformer = TransformerLoader(
    config=LTXVideoTransformerConfig,
    build=LTXVideoTransformer3DModel,
    plan=LTX_VIDEO_PLAN,
    heads=lambda config: config.num_attention_heads,
)
