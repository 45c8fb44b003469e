"""How the LTX-2 DiT is sharded between ranks.

Video tokens are sharded. Audio tokens, a few dozen a second, are whole on every rank: only the results of their
attention to the video are exchanged.
"""

from __future__ import annotations

from models.parallel.plan import Cut, Join, ParallelPlan

BLOCK = "transformer_blocks.*"
VIDEO, FIRST_FRAME, AUDIO = "video", "first_frame", "audio"

_ATTENTION = f"{BLOCK}.*attn*"
_FEED_FORWARD = f"{BLOCK}.*ff"

GATE_LOGITS = f"{_ATTENTION}.to_gate_logits"

LTX2_PLAN = ParallelPlan(
    column=(f"{_ATTENTION}.to_[qkv]", GATE_LOGITS, f"{_FEED_FORWARD}.net.0.proj"),
    row=(f"{_ATTENTION}.to_out.0", f"{_FEED_FORWARD}.net.2"),
    norms=(f"{_ATTENTION}.norm_[qk]",),
    heads=(f"{_ATTENTION}.own_heads",),
    attention=(f"{BLOCK}.attn1.inner",),
    sharded_keys=(f"{BLOCK}.video_to_audio_attn.inner",),
    cuts=(
        Cut("tokens", "x_BSD", VIDEO),
        Cut("tokens", "positions", VIDEO, dim=0),
        Cut("tokens", "first_BSD", FIRST_FRAME),
        Cut("tokens", "first_positions", FIRST_FRAME, dim=0),
    ),
    joins=(Join("tokens", VIDEO, result=VIDEO), Join("tokens", FIRST_FRAME, result=FIRST_FRAME)),
)
