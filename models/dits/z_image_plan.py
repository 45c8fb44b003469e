"""How the Z-Image DiT is sharded between ranks, and its loader.

The text is refined once a request, whole on every rank of the sequence axes. The image is refined alone, so that its
attention has no text tokens; then both are sharded.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from configs.models.dits.z_image import ZImageTransformerConfig
from models.dits.loading import load_transformer
from models.dits.z_image import ZImageTransformer2DModel
from models.parallel.plan import Cut, Join, ParallelPlan

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from models.parallel.mesh import WorkerMesh

REFINERS = ("noise_refiner.*", "context_refiner.*")
LAYERS = "layers.*"
BLOCKS = (*REFINERS, LAYERS)
TEXT, IMAGE = "text", "image"

Z_IMAGE_PLAN = ParallelPlan(
    column=tuple(f"{block}.{name}" for block in BLOCKS for name in ("attention.to_[qkv]", "feed_forward.w[13]")),
    row=tuple(f"{block}.{name}" for block in BLOCKS for name in ("attention.to_out.0", "feed_forward.w2")),
    # Read once a request: whole, these weights would cost each rank their memory.
    gathered=("noise_refiner.*.adaLN_modulation.0", f"{LAYERS}.adaLN_modulation.0"),
    token_segments={TEXT: "sharded", IMAGE: "sharded"},
    attention=("noise_refiner.*.attention.inner", f"{LAYERS}.attention.inner"),
    cuts=(
        Cut("refine", "image_BID", IMAGE),
        Cut("refine", "cos", IMAGE, dim=0),
        Cut("refine", "sin", IMAGE, dim=0),
        Cut("tokens", "text_BTD", TEXT),
        Cut("tokens", "text_cos", TEXT, dim=0),
        Cut("tokens", "text_sin", TEXT, dim=0),
        Cut("tokens", "cos", IMAGE, dim=0),
        Cut("tokens", "sin", IMAGE, dim=0),
    ),
    joins=(Join("tokens", IMAGE),),
)


def load_z_image_transformer(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None
) -> ZImageTransformer2DModel:
    """The DiT of the module's config.json, or this rank's part of it. Raises as load_transformer()."""
    config = ZImageTransformerConfig.from_dict(name, checkpoint.module_config(name))
    return load_transformer(
        partial(ZImageTransformer2DModel, config),
        Z_IMAGE_PLAN,
        checkpoint,
        name,
        device,
        dtype,
        mesh,
        heads=config.num_attention_heads,
        feed_forward=config.feed_forward_size,
    )
