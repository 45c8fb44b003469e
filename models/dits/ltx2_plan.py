"""How the LTX-2 DiT is sharded between ranks, and its loader.

Video tokens are sharded. Audio tokens, a few dozen a second, are whole on every rank: only the results of their
attention to the video are exchanged.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from configs.models.dits.ltx2 import LTX2TransformerConfig
from models.dits.loading import load_transformer
from models.dits.ltx2 import AUDIO, FIRST_FRAME, VIDEO, LTX2VideoTransformer3DModel
from models.parallel.plan import Cut, Join, ParallelPlan

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from models.parallel.mesh import WorkerMesh

BLOCK = "transformer_blocks.*"

_ATTENTION = f"{BLOCK}.*attn*"
_FEED_FORWARD = f"{BLOCK}.*ff"

_GATE_LOGITS = f"{_ATTENTION}.to_gate_logits"

LTX2_PLAN = ParallelPlan(
    column=(f"{_ATTENTION}.to_[qkv]", _GATE_LOGITS, f"{_FEED_FORWARD}.net.0.proj"),
    row=(f"{_ATTENTION}.to_out.0", f"{_FEED_FORWARD}.net.2"),
    # One logit for each head.
    minor=(_GATE_LOGITS,),
    norms=(f"{_ATTENTION}.norm_[qk]",),
    heads=(f"{_ATTENTION}.own_heads",),
    token_segments={VIDEO: "sharded", FIRST_FRAME: "sharded", AUDIO: "whole", "text": "whole"},
    attention=(f"{BLOCK}.attn1.inner",),
    sharded_keys=(f"{BLOCK}.video_to_audio_attn.inner",),
    cuts=(
        Cut("tokens", "x_BSD", VIDEO),
        Cut("tokens", "positions", VIDEO, dim=0),
        Cut("tokens", "first_BSD", FIRST_FRAME),
        Cut("tokens", "first_positions", FIRST_FRAME, dim=0),
    ),
    joins=(Join("tokens", VIDEO, result=VIDEO), Join("tokens", FIRST_FRAME, result=FIRST_FRAME)),
)


def load_ltx2_transformer(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None
) -> LTX2VideoTransformer3DModel:
    """The DiT of the module's config.json, or this rank's part of it. Raises as load_transformer()."""
    config = LTX2TransformerConfig.from_dict(name, checkpoint.module_config(name))
    build = partial(LTX2VideoTransformer3DModel, config)
    return load_transformer(build, LTX2_PLAN, checkpoint, name, device, dtype, mesh, heads=config.video.num_heads)
