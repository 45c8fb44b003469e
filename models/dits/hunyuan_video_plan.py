"""How the HunyuanVideo DiT is sharded between ranks, and its loader.

The text is refined once a request for all steps, whole on every rank of the sequence axes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from configs.models.dits.hunyuan_video import HunyuanVideoTransformerConfig
from models.dits.flux_plan import FLUX_PLAN
from models.dits.hunyuan_video import HunyuanVideoTransformer3DModel
from models.dits.loading import load_transformer
from models.parallel.plan import Cut, Join

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from models.parallel.mesh import WorkerMesh

REFINER = "context_embedder.token_refiner.refiner_blocks.*"
TEXT, VIDEO = "text", "video"

_REFINER_COLUMNS = (f"{REFINER}.attn.to_[qkv]", f"{REFINER}.ff.net.0.proj")
_REFINER_ROWS = (f"{REFINER}.attn.to_out.0", f"{REFINER}.ff.net.2")

HUNYUAN_VIDEO_PLAN = replace(
    FLUX_PLAN,
    column=(*FLUX_PLAN.column, *_REFINER_COLUMNS),
    gathered=(*FLUX_PLAN.gathered, f"{REFINER}.norm_out.linear"),
    row=(*FLUX_PLAN.row, *_REFINER_ROWS),
    # They run once a request.
    minor=(*_REFINER_COLUMNS, *_REFINER_ROWS),
    token_segments={TEXT: "sharded", VIDEO: "sharded"},
    cuts=(
        Cut("tokens", "video_BID", VIDEO),
        Cut("tokens", "cos", VIDEO, dim=0),
        Cut("tokens", "sin", VIDEO, dim=0),
        Cut("tokens", "text_BTD", TEXT),
    ),
    joins=(Join("tokens", VIDEO),),
)


def load_hunyuan_video_transformer(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None
) -> HunyuanVideoTransformer3DModel:
    """The DiT of the module's config.json, or this rank's part of it. Raises as load_transformer()."""
    config = HunyuanVideoTransformerConfig.from_dict(name, checkpoint.module_config(name))
    build = partial(HunyuanVideoTransformer3DModel, config)
    return load_transformer(
        build, HUNYUAN_VIDEO_PLAN, checkpoint, name, device, dtype, mesh, heads=config.num_attention_heads
    )
