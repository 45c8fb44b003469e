"""How the causal Wan DiT is sharded between ranks, and its loader."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from configs.models.dits.causal_wan import CausalWanTransformerConfig
from models.dits.causal_wan import CausalWanTransformer3DModel
from models.dits.wan_plan import load_wan_weights

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from models.parallel.mesh import WorkerMesh


def load_causal_wan_transformer(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None
) -> CausalWanTransformer3DModel:
    """The DiT of the module's config.json, or this rank's part of it. Raises as load_transformer()."""
    config = CausalWanTransformerConfig.from_dict(name, checkpoint.module_config(name))
    build = partial(CausalWanTransformer3DModel, config)
    return load_wan_weights(build, config, checkpoint, name, device, dtype, mesh)
