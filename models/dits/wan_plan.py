"""How the Wan DiT is sharded between ranks."""

from __future__ import annotations

from models.parallel.plan import Cut, Join, ParallelPlan

BLOCK = "blocks.*"
VIDEO, FIRST_FRAME = "video", "first_frame"

WAN_PLAN = ParallelPlan(
    # The second attention is to text and pictures, which every rank has whole, for its own heads and video tokens.
    column=(f"{BLOCK}.attn[12].to_[qkv]", f"{BLOCK}.attn2.add_[kv]_proj", f"{BLOCK}.ffn.net.0.proj"),
    row=(f"{BLOCK}.attn[12].to_out.0", f"{BLOCK}.ffn.net.2"),
    norms=(f"{BLOCK}.attn[12].norm_[qk]", f"{BLOCK}.attn2.norm_added_k"),
    attention=(f"{BLOCK}.attn1.inner",),
    cuts=(
        Cut("tokens", "x_BSD", VIDEO),
        Cut("tokens", "cos", VIDEO, dim=0),
        Cut("tokens", "sin", VIDEO, dim=0),
        # A first frame with a timestep of its own is sharded separately: every rank has a chunk of both segments.
        Cut("tokens", "first_BSD", FIRST_FRAME),
        Cut("tokens", "first_cos", FIRST_FRAME, dim=0),
        Cut("tokens", "first_sin", FIRST_FRAME, dim=0),
    ),
    joins=(Join("tokens", VIDEO, result=VIDEO), Join("tokens", FIRST_FRAME, result=FIRST_FRAME)),
)
