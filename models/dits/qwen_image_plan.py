"""Parallel plan and loader of the Qwen-Image DiT."""

from __future__ import annotations

from configs.models.dits.qwen_image import QwenImageTransformerConfig
from models.dits.loading import TransformerLoader
from models.dits.qwen_image import QwenImageTransformer2DModel
from models.parallel.plan import GatheredResult, ParallelPlan, ShardedArgument

BLOCK = "transformer_blocks.*"

QWEN_IMAGE_PLAN = ParallelPlan(
    column=(
        f"{BLOCK}.attn.to_[qkv]",
        f"{BLOCK}.attn.add_[qkv]_proj",
        f"{BLOCK}.img_mlp.net.0.proj",
        f"{BLOCK}.txt_mlp.net.0.proj",
    ),
    row=(
        f"{BLOCK}.attn.to_out.0",
        f"{BLOCK}.attn.to_add_out",
        f"{BLOCK}.img_mlp.net.2",
        f"{BLOCK}.txt_mlp.net.2",
    ),
    # These layers run once per request but hold a third of the weights: replicas would use much memory on each rank.
    gathered=(f"{BLOCK}.img_mod.1", f"{BLOCK}.txt_mod.1"),
    token_segments={"text": "sharded", "image": "sharded", "condition": "sharded"},
    attention=(f"{BLOCK}.attn.inner",),
    # Input images may have a separate timestep. They are a separate segment: each rank has a chunk of both segments.
    sharded_arguments=(
        ShardedArgument("prepare", "encoder_hidden_states", "text"),
        ShardedArgument("prepare", "txt_ids", "text", dim=0),
        ShardedArgument("prepare", "img_ids", "image", dim=0),
        ShardedArgument("prepare", "condition_ids", "condition", dim=0),
        ShardedArgument("predict", "hidden_states", "image"),
        ShardedArgument("predict", "condition_states", "condition"),
    ),
    gathered_results=(GatheredResult("predict", "image", result="hidden_states"),),
)

load_qwen_image_transformer = TransformerLoader(
    config=QwenImageTransformerConfig,
    build=QwenImageTransformer2DModel,
    plan=QWEN_IMAGE_PLAN,
    heads=lambda config: config.num_attention_heads,
)
