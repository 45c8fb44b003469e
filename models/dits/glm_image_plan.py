"""How the GLM-Image DiT is sharded between ranks."""

from __future__ import annotations

from models.parallel.plan import Cut, Join, ParallelPlan

BLOCK = "transformer_blocks.*"
TEXT, IMAGE = "text", "image"

GLM_IMAGE_PLAN = ParallelPlan(
    column=(f"{BLOCK}.attn1.to_[qkv]", f"{BLOCK}.ff.net.0.proj"),
    row=(f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.ff.net.2"),
    # Read once a request: whole, these weights would cost each rank their memory.
    gathered=(f"{BLOCK}.norm1.linear",),
    attention=(f"{BLOCK}.attn1.inner",),
    cuts=(
        Cut("prepare", "encoder_hidden_states", TEXT),
        Cut("prepare", "prior_token_id", IMAGE),
        Cut("prepare", "prior_token_drop", IMAGE),
        Cut("tokens", "image_BIC", IMAGE),
        Cut("tokens", "cos", IMAGE, dim=0),
        Cut("tokens", "sin", IMAGE, dim=0),
    ),
    joins=(Join("tokens", IMAGE),),
)
