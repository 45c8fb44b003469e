"""How the LTX-Video DiT is sharded between ranks, and its loader."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from configs.models.dits.ltx_video import LTXVideoTransformerConfig
from models.dits.loading import load_transformer
from models.dits.ltx_video import FIRST_FRAME, VIDEO, LTXVideoTransformer3DModel
from models.parallel.plan import Cut, Join, ParallelPlan

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from models.parallel.mesh import WorkerMesh

BLOCK = "transformer_blocks.*"

LTX_VIDEO_PLAN = ParallelPlan(
    # The second attention is to the text, which every rank has whole, for its own heads and video tokens.
    column=(f"{BLOCK}.attn[12].to_[qkv]", f"{BLOCK}.ff.net.0.proj"),
    row=(f"{BLOCK}.attn[12].to_out.0", f"{BLOCK}.ff.net.2"),
    norms=(f"{BLOCK}.attn[12].norm_[qk]",),
    heads=(f"{BLOCK}.attn1.own_heads",),
    token_segments={VIDEO: "sharded", FIRST_FRAME: "sharded", "text": "whole"},
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


def load_ltx_video_transformer(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None
) -> LTXVideoTransformer3DModel:
    """The DiT of the module's config.json, or this rank's part of it. Raises as load_transformer()."""
    config = LTXVideoTransformerConfig.from_dict(name, checkpoint.module_config(name))
    build = partial(LTXVideoTransformer3DModel, config)
    return load_transformer(
        build, LTX_VIDEO_PLAN, checkpoint, name, device, dtype, mesh, heads=config.num_attention_heads
    )
