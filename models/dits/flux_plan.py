"""How the Flux DiT is sharded between ranks, and its loader."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from configs.models.dits.flux import FluxTransformerConfig
from models.dits.flux import FluxTransformer2DModel
from models.dits.loading import load_transformer
from models.parallel.plan import Cut, Join, ParallelPlan

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from models.parallel.mesh import WorkerMesh

DOUBLE, SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"

FLUX_PLAN = ParallelPlan(
    column=(
        f"{DOUBLE}.attn.to_[qkv]",
        f"{DOUBLE}.attn.add_[qkv]_proj",
        f"{DOUBLE}.ff.net.0.proj",
        f"{DOUBLE}.ff_context.net.0.proj",
        f"{SINGLE}.attn.to_[qkv]",
        f"{SINGLE}.proj_mlp",
    ),
    row=(
        f"{DOUBLE}.attn.to_out.0",
        f"{DOUBLE}.attn.to_add_out",
        f"{DOUBLE}.ff.net.2",
        f"{DOUBLE}.ff_context.net.2",
        f"{SINGLE}.proj_out",
    ),
    # A third of the weights, read once a request: whole, they would cost each rank their memory.
    gathered=(f"{DOUBLE}.norm1.linear", f"{DOUBLE}.norm1_context.linear", f"{SINGLE}.norm.linear"),
    # Its inputs are the heads, and beside them the feed-forward, four times as wide.
    parts={f"{SINGLE}.proj_out": (1, 4)},
    token_segments={"text": "sharded", "image": "sharded"},
    attention=(f"{DOUBLE}.attn.inner", f"{SINGLE}.attn.inner"),
    cuts=(
        Cut("prepare", "encoder_hidden_states", "text"),
        Cut("prepare", "txt_ids", "text", dim=0),
        Cut("prepare", "img_ids", "image", dim=0),
        Cut("predict", "hidden_states", "image"),
    ),
    joins=(Join("predict", "image", result="hidden_states"),),
)


def load_flux_transformer(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None
) -> FluxTransformer2DModel:
    """The DiT of the module's config.json, or this rank's part of it. Raises as load_transformer()."""
    config = FluxTransformerConfig.from_dict(name, checkpoint.module_config(name))
    build = partial(FluxTransformer2DModel, config)
    return load_transformer(build, FLUX_PLAN, checkpoint, name, device, dtype, mesh, heads=config.num_attention_heads)
