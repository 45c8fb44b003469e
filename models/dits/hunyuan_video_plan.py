"""How the HunyuanVideo DiT is sharded between ranks.

The text is refined once a request for all steps, whole on every rank of the sequence axes.
"""

from __future__ import annotations

from dataclasses import replace

from models.dits.flux_plan import FLUX_PLAN
from models.parallel.plan import Cut, Join

REFINER = "context_embedder.token_refiner.refiner_blocks.*"
TEXT, VIDEO = "text", "video"

HUNYUAN_VIDEO_PLAN = replace(
    FLUX_PLAN,
    column=(*FLUX_PLAN.column, f"{REFINER}.attn.to_[qkv]", f"{REFINER}.ff.net.0.proj"),
    gathered=(*FLUX_PLAN.gathered, f"{REFINER}.norm_out.linear"),
    row=(*FLUX_PLAN.row, f"{REFINER}.attn.to_out.0", f"{REFINER}.ff.net.2"),
    cuts=(
        Cut("tokens", "video_BID", VIDEO),
        Cut("tokens", "cos", VIDEO, dim=0),
        Cut("tokens", "sin", VIDEO, dim=0),
        Cut("tokens", "text_BTD", TEXT),
    ),
    joins=(Join("tokens", VIDEO),),
)
