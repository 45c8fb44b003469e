"""How the Qwen-Image DiT is sharded between ranks, and its loader."""

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
    # A third of the weights, read once a request: whole, they would cost each rank their memory.
    gathered=(f"{BLOCK}.img_mod.1", f"{BLOCK}.txt_mod.1"),
    token_segments={"text": "sharded", "image": "sharded", "condition": "sharded"},
    attention=(f"{BLOCK}.attn.inner",),
    # Given images, which may have a timestep of their own, are sharded separately: every rank has a chunk of them.
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
