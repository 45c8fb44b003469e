"""How the Wan DiT is sharded between ranks, and its loader."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from configs.models.dits.wan import WanTransformerConfig
from models.dits.loading import load_transformer
from models.dits.wan import FIRST_FRAME, FLOAT32_PARAMETERS, UNUSED_PARAMETERS, VIDEO, WanTransformer3DModel
from models.parallel.plan import Cut, Join, ParallelPlan

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from models.parallel.mesh import WorkerMesh

BLOCK = "blocks.*"

WAN_PLAN = ParallelPlan(
    # The second attention is to text and pictures, which every rank has whole, for its own heads and video tokens.
    column=(f"{BLOCK}.attn[12].to_[qkv]", f"{BLOCK}.attn2.add_[kv]_proj", f"{BLOCK}.ffn.net.0.proj"),
    row=(f"{BLOCK}.attn[12].to_out.0", f"{BLOCK}.ffn.net.2"),
    norms=(f"{BLOCK}.attn[12].norm_[qk]", f"{BLOCK}.attn2.norm_added_k"),
    token_segments={VIDEO: "sharded", FIRST_FRAME: "sharded", "text": "whole", "image": "whole"},
    attention=(f"{BLOCK}.attn1.inner",),
    cuts=(
        Cut("tokens", "x_BSD", VIDEO),
        Cut("tokens", "cos", VIDEO, dim=0),
        Cut("tokens", "sin", VIDEO, dim=0),
        # A first frame with a timestep of its own is sharded separately: every rank has a chunk of both segments.
        Cut("tokens", "first_BSD", FIRST_FRAME),
        Cut("tokens", "first_cos", FIRST_FRAME, dim=0),
        Cut("tokens", "first_sin", FIRST_FRAME, dim=0),
    ),
    joins=(Join("tokens", VIDEO, result=VIDEO), Join("tokens", FIRST_FRAME, result=FIRST_FRAME)),
)

Wan = TypeVar("Wan", bound=WanTransformer3DModel)


def load_wan_transformer(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None
) -> WanTransformer3DModel:
    """The DiT of the module's config.json, or this rank's part of it. Raises as load_transformer()."""
    config = WanTransformerConfig.from_dict(name, checkpoint.module_config(name))
    return load_wan_weights(partial(WanTransformer3DModel, config), config, checkpoint, name, device, dtype, mesh)


def load_wan_weights(
    build: Callable[[], Wan],
    config: WanTransformerConfig,
    checkpoint: Checkpoint,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    mesh: WorkerMesh | None,
) -> Wan:
    """The DiT that `build` makes of `config`, with the module's weights. Raises as load_transformer()."""
    return load_transformer(
        build,
        WAN_PLAN,
        checkpoint,
        name,
        device,
        dtype,
        mesh,
        heads=config.num_attention_heads,
        feed_forward=config.ffn_dim,
        keep_float32=FLOAT32_PARAMETERS,
        unused=UNUSED_PARAMETERS,
        own_entries=config.own_entries,
    )
