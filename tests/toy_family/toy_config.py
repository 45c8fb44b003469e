"""Pipeline config of the toy family, and the loader of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from configs.pipeline_configs.base import PipelineConfig

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class ToyPipelineConfig(PipelineConfig):
    """Config of the toy family. One latent is decoded to a square with a side of `cell` pixels."""

    cell: int
    module_loaders: ClassVar[Mapping[str, str]] = {
        "ToyPalette": "toy_config:load_weight",
        "ToyTransformer": "toy_config:load_weight",
    }

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Read the transformer's config."""
        return cls(cell=int(checkpoint.module_config("transformer")["cell"]))


def load_weight(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Load a module, which is one tensor."""
    (file,) = checkpoint.weight_files(name)
    weight: Tensor = load_file(file)["weight"]
    return weight.to(device, dtype)
