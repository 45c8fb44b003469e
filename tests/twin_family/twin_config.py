"""Pipeline configs of the twin family's variants; the loader records the loaded modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import toy_config
from torch import Tensor

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint

LOADED: list[str] = []
"""Names of the modules that this process has loaded, in order."""


@dataclass(frozen=True, kw_only=True)
class TwinPipelineConfig(toy_config.ToyPipelineConfig):
    """The variant without an image. `brightness` multiplies the color of the prompt."""

    brightness: float = 1.0
    module_loaders: ClassVar[Mapping[str, str]] = {
        "ToyPalette": "twin_config:load_weight",
        "ToyTransformer": "twin_config:load_weight",
        "TwinLens": "twin_config:load_weight",
    }


@dataclass(frozen=True, kw_only=True)
class TwinImagePipelineConfig(TwinPipelineConfig):
    """The variant with an image, whose mean color has the weight `tint`."""

    brightness: float = 0.75
    tint: float = 0.5


def load_weight(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Load a module, which is one tensor."""
    LOADED.append(name)
    return toy_config.load_weight(checkpoint, name, device, dtype)
