"""How the Z-Image DiT is sharded between ranks.

The text is refined once a request, whole on every rank of the sequence axes. The image is refined alone, so that its
attention has no text tokens; then both are sharded.
"""

from __future__ import annotations

from models.parallel.plan import Cut, Join, ParallelPlan

REFINERS = ("noise_refiner.*", "context_refiner.*")
LAYERS = "layers.*"
BLOCKS = (*REFINERS, LAYERS)
TEXT, IMAGE = "text", "image"

Z_IMAGE_PLAN = ParallelPlan(
    column=tuple(f"{block}.{name}" for block in BLOCKS for name in ("attention.to_[qkv]", "feed_forward.w[13]")),
    row=tuple(f"{block}.{name}" for block in BLOCKS for name in ("attention.to_out.0", "feed_forward.w2")),
    # Read once a request: whole, these weights would cost each rank their memory.
    gathered=("noise_refiner.*.adaLN_modulation.0", f"{LAYERS}.adaLN_modulation.0"),
    attention=("noise_refiner.*.attention.inner", f"{LAYERS}.attention.inner"),
    cuts=(
        Cut("refine", "image_BID", IMAGE),
        Cut("refine", "cos", IMAGE, dim=0),
        Cut("refine", "sin", IMAGE, dim=0),
        Cut("refine", "text_BTD", TEXT),
        Cut("tokens", "text_BTD", TEXT),
        Cut("tokens", "text_cos", TEXT, dim=0),
        Cut("tokens", "text_sin", TEXT, dim=0),
        Cut("tokens", "cos", IMAGE, dim=0),
        Cut("tokens", "sin", IMAGE, dim=0),
    ),
    joins=(Join("tokens", IMAGE),),
)
