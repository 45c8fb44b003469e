"""Parallel plan and loader of the LTX-2 DiT.

Video tokens are sharded. Audio tokens, a few dozen per second, are replicated on all ranks: only the results of their
attention to the video are all-gathered.
"""

from __future__ import annotations

from configs.models.dits.ltx2 import LTX2TransformerConfig
from models.dits.loading import TransformerLoader
from models.dits.ltx2 import AUDIO, FIRST_FRAME, VIDEO, LTX2VideoTransformer3DModel
from models.parallel.plan import GatheredResult, ParallelPlan, ShardedArgument

BLOCK = "transformer_blocks.*"

_ATTENTION = f"{BLOCK}.*attn*"
_FEED_FORWARD = f"{BLOCK}.*ff"

_GATE_LOGITS = f"{_ATTENTION}.to_gate_logits"

LTX2_PLAN = ParallelPlan(
    column=(f"{_ATTENTION}.to_[qkv]", _GATE_LOGITS, f"{_FEED_FORWARD}.net.0.proj"),
    row=(f"{_ATTENTION}.to_out.0", f"{_FEED_FORWARD}.net.2"),
    # These layers are small: they have one output per head.
    unquantized=(_GATE_LOGITS,),
    norms=(f"{_ATTENTION}.norm_[qk]",),
    select_heads=(f"{_ATTENTION}.select_heads",),
    token_segments={VIDEO: "sharded", FIRST_FRAME: "sharded", AUDIO: "replicated", "text": "replicated"},
    attention=(f"{BLOCK}.attn1.inner",),
    sharded_keys=(f"{BLOCK}.video_to_audio_attn.inner",),
    sharded_arguments=(
        ShardedArgument("predict_tokens", "x_BSD", VIDEO),
        ShardedArgument("predict_tokens", "positions", VIDEO, dim=0),
        ShardedArgument("predict_tokens", "first_BSD", FIRST_FRAME),
        ShardedArgument("predict_tokens", "first_positions", FIRST_FRAME, dim=0),
    ),
    gathered_results=(
        GatheredResult("predict_tokens", VIDEO, result=VIDEO),
        GatheredResult("predict_tokens", FIRST_FRAME, result=FIRST_FRAME),
    ),
)

load_ltx2_transformer = TransformerLoader(
    config=LTX2TransformerConfig,
    build=LTX2VideoTransformer3DModel,
    plan=LTX2_PLAN,
    heads=lambda config: config.video.num_heads,
)
