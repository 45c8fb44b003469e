"""Parallel plan and loader of the Z-Image DiT.

The text is refined once per request; its refiner is replicated on all ranks of the sequence axes. The image's refiner,
whose attention has no text tokens, runs on sharded image tokens. All other blocks run on sharded text and image tokens.
"""

from __future__ import annotations

from configs.models.dits.z_image import ZImageTransformerConfig
from models.dits.loading import TransformerLoader
from models.dits.z_image import ZImageTransformer2DModel
from models.parallel.plan import GatheredResult, ParallelPlan, ShardedArgument

REFINERS = ("noise_refiner.*", "context_refiner.*")
LAYERS = "layers.*"
BLOCKS = (*REFINERS, LAYERS)
TEXT, IMAGE = "text", "image"

Z_IMAGE_PLAN = ParallelPlan(
    column=tuple(f"{block}.{name}" for block in BLOCKS for name in ("attention.to_[qkv]", "feed_forward.w[13]")),
    row=tuple(f"{block}.{name}" for block in BLOCKS for name in ("attention.to_out.0", "feed_forward.w2")),
    # These layers run once per request: replicas of their weights would cost memory on each rank.
    gathered=("noise_refiner.*.adaLN_modulation.0", f"{LAYERS}.adaLN_modulation.0"),
    token_segments={TEXT: "sharded", IMAGE: "sharded"},
    attention=("noise_refiner.*.attention.inner", f"{LAYERS}.attention.inner"),
    sharded_arguments=(
        ShardedArgument("refine", "image_BID", IMAGE),
        ShardedArgument("refine", "cos", IMAGE, dim=0),
        ShardedArgument("refine", "sin", IMAGE, dim=0),
        ShardedArgument("predict_tokens", "text_BTD", TEXT),
        ShardedArgument("predict_tokens", "text_cos", TEXT, dim=0),
        ShardedArgument("predict_tokens", "text_sin", TEXT, dim=0),
        ShardedArgument("predict_tokens", "cos", IMAGE, dim=0),
        ShardedArgument("predict_tokens", "sin", IMAGE, dim=0),
    ),
    gathered_results=(GatheredResult("predict_tokens", IMAGE),),
)

load_z_image_transformer = TransformerLoader(
    config=ZImageTransformerConfig,
    build=ZImageTransformer2DModel,
    plan=Z_IMAGE_PLAN,
    heads=lambda config: config.num_attention_heads,
    feed_forward=lambda config: config.feed_forward_size,
)
