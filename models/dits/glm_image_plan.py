"""How the GLM-Image DiT is sharded between ranks, and its loader."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from configs.models.dits.glm_image import GlmImageTransformerConfig
from models.dits.glm_image import GlmImageTransformer2DModel
from models.dits.loading import load_transformer
from models.parallel.plan import Cut, Join, ParallelPlan

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from models.parallel.mesh import WorkerMesh

BLOCK = "transformer_blocks.*"
TEXT, IMAGE = "text", "image"

GLM_IMAGE_PLAN = ParallelPlan(
    column=(f"{BLOCK}.attn1.to_[qkv]", f"{BLOCK}.ff.net.0.proj"),
    row=(f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.ff.net.2"),
    # Read once a request: whole, these weights would cost each rank their memory.
    gathered=(f"{BLOCK}.norm1.linear",),
    token_segments={TEXT: "sharded", IMAGE: "sharded"},
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


def load_glm_image_transformer(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None
) -> GlmImageTransformer2DModel:
    """The DiT of the module's config.json, or this rank's part of it. Raises as load_transformer()."""
    config = GlmImageTransformerConfig.from_dict(name, checkpoint.module_config(name))
    build = partial(GlmImageTransformer2DModel, config)
    return load_transformer(
        build, GLM_IMAGE_PLAN, checkpoint, name, device, dtype, mesh, heads=config.num_attention_heads
    )
