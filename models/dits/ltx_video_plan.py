"""Parallel plan and loader of the LTX-Video DiT."""

from __future__ import annotations

from configs.models.dits.ltx_video import LTXVideoTransformerConfig
from models.dits.loading import TransformerLoader
from models.dits.ltx_video import FIRST_FRAME, VIDEO, LTXVideoTransformer3DModel
from models.dits.wan_plan import WAN_PLAN
from models.parallel.plan import ParallelPlan

BLOCK = "transformer_blocks.*"

LTX_VIDEO_PLAN = ParallelPlan(
    # attn2 is cross-attention to the text, which is replicated; a rank computes it for its heads and tokens.
    column=(f"{BLOCK}.attn[12].to_[qkv]", f"{BLOCK}.ff.net.0.proj"),
    row=(f"{BLOCK}.attn[12].to_out.0", f"{BLOCK}.ff.net.2"),
    norms=(f"{BLOCK}.attn[12].norm_[qk]",),
    select_heads=(f"{BLOCK}.attn1.select_heads",),
    token_segments={VIDEO: "sharded", FIRST_FRAME: "sharded", "text": "replicated"},
    attention=(f"{BLOCK}.attn1.inner",),
    # predict_tokens() has the same segments and sharded arguments as Wan's predict_tokens().
    sharded_arguments=WAN_PLAN.sharded_arguments,
    gathered_results=WAN_PLAN.gathered_results,
)

load_ltx_video_transformer = TransformerLoader(
    config=LTXVideoTransformerConfig,
    build=LTXVideoTransformer3DModel,
    plan=LTX_VIDEO_PLAN,
    heads=lambda config: config.num_attention_heads,
)
