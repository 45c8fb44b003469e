"""Parallel plan and loader of the HunyuanVideo DiT.

The text is refined once per request for all steps; the refiner is replicated on all ranks of the sequence axes.
"""

from __future__ import annotations

from dataclasses import replace

from configs.models.dits.hunyuan_video import HunyuanVideoTransformerConfig
from models.dits.flux_plan import FLUX_PLAN
from models.dits.hunyuan_video import HunyuanVideoTransformer3DModel
from models.dits.loading import TransformerLoader
from models.parallel.plan import GatheredResult, ShardedArgument

REFINER = "context_embedder.token_refiner.refiner_blocks.*"
TEXT, VIDEO = "text", "video"

_REFINER_COLUMNS = (f"{REFINER}.attn.to_[qkv]", f"{REFINER}.ff.net.0.proj")
_REFINER_ROWS = (f"{REFINER}.attn.to_out.0", f"{REFINER}.ff.net.2")

HUNYUAN_VIDEO_PLAN = replace(
    FLUX_PLAN,
    column=(*FLUX_PLAN.column, *_REFINER_COLUMNS),
    gathered=(*FLUX_PLAN.gathered, f"{REFINER}.norm_out.linear"),
    row=(*FLUX_PLAN.row, *_REFINER_ROWS),
    # The refiner runs once per request.
    unquantized=(*_REFINER_COLUMNS, *_REFINER_ROWS),
    token_segments={TEXT: "sharded", VIDEO: "sharded"},
    sharded_arguments=(
        ShardedArgument("predict_tokens", "video_BID", VIDEO),
        ShardedArgument("predict_tokens", "cos", VIDEO, dim=0),
        ShardedArgument("predict_tokens", "sin", VIDEO, dim=0),
        ShardedArgument("predict_tokens", "text_BTD", TEXT),
    ),
    gathered_results=(GatheredResult("predict_tokens", VIDEO),),
)

load_hunyuan_video_transformer = TransformerLoader(
    config=HunyuanVideoTransformerConfig,
    build=HunyuanVideoTransformer3DModel,
    plan=HUNYUAN_VIDEO_PLAN,
    heads=lambda config: config.num_attention_heads,
)
