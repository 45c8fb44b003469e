"""Parallel plan and loader of the GLM-Image DiT."""

from __future__ import annotations

from configs.models.dits.glm_image import GlmImageTransformerConfig
from models.dits.glm_image import GlmImageTransformer2DModel
from models.dits.loading import TransformerLoader
from models.parallel.plan import GatheredResult, ParallelPlan, ShardedArgument

BLOCK = "transformer_blocks.*"
TEXT, IMAGE = "text", "image"

GLM_IMAGE_PLAN = ParallelPlan(
    column=(f"{BLOCK}.attn1.to_[qkv]", f"{BLOCK}.ff.net.0.proj"),
    row=(f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.ff.net.2"),
    # These layers run once per request: replicas of their weights would cost memory on each rank.
    gathered=(f"{BLOCK}.norm1.linear",),
    token_segments={TEXT: "sharded", IMAGE: "sharded"},
    attention=(f"{BLOCK}.attn1.inner",),
    sharded_arguments=(
        ShardedArgument("prepare", "encoder_hidden_states", TEXT),
        ShardedArgument("prepare", "prior_token_id", IMAGE),
        ShardedArgument("prepare", "prior_token_drop", IMAGE),
        ShardedArgument("predict_tokens", "image_BIC", IMAGE),
        ShardedArgument("predict_tokens", "cos", IMAGE, dim=0),
        ShardedArgument("predict_tokens", "sin", IMAGE, dim=0),
    ),
    gathered_results=(GatheredResult("predict_tokens", IMAGE),),
)

load_glm_image_transformer = TransformerLoader(
    config=GlmImageTransformerConfig,
    build=GlmImageTransformer2DModel,
    plan=GLM_IMAGE_PLAN,
    heads=lambda config: config.num_attention_heads,
)
