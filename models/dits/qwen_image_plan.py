"""How the Qwen-Image DiT is sharded between ranks, and its loader."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from configs.models.dits.qwen_image import QwenImageTransformerConfig
from models.dits.loading import load_transformer
from models.dits.qwen_image import QwenImageTransformer2DModel
from models.parallel.plan import Cut, Join, ParallelPlan

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from models.parallel.mesh import WorkerMesh

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
    cuts=(
        Cut("prepare", "encoder_hidden_states", "text"),
        Cut("prepare", "txt_ids", "text", dim=0),
        Cut("prepare", "img_ids", "image", dim=0),
        Cut("prepare", "condition_ids", "condition", dim=0),
        Cut("predict", "hidden_states", "image"),
        Cut("predict", "condition_states", "condition"),
    ),
    joins=(Join("predict", "image", result="hidden_states"),),
)


def load_qwen_image_transformer(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None
) -> QwenImageTransformer2DModel:
    """The DiT of the module's config.json, or this rank's part of it. Raises as load_transformer()."""
    config = QwenImageTransformerConfig.from_dict(name, checkpoint.module_config(name))
    build = partial(QwenImageTransformer2DModel, config)
    return load_transformer(
        build, QWEN_IMAGE_PLAN, checkpoint, name, device, dtype, mesh, heads=config.num_attention_heads
    )
