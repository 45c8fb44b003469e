"""The transformer that takes its time, and the config that names it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from configs.pipeline_configs.wan import WanPipelineConfig

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class PacedWanPipelineConfig(WanPipelineConfig):
    """Wan's, with another transformer."""

    module_loaders: ClassVar[Mapping[str, str]] = MappingProxyType(
        {**WanPipelineConfig.module_loaders, "WanTransformer3DModel": "paced_config:load_paced"}
    )


class PacedTransformer(nn.Module):
    """Predicts no change after `seconds`, during which the processor is free, as it is while a GPU computes.

    It writes into `log` when each step begins, in ns of the monotonic clock, a line a step.
    """

    def __init__(self, seconds: float, log: Path) -> None:
        super().__init__()
        self._seconds = seconds
        self._log = log.open("w", buffering=1)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Zeros in the shape of the latents."""
        del timestep, encoder_hidden_states
        self._log.write(f"{time.monotonic_ns()}\n")
        time.sleep(self._seconds)
        return torch.zeros_like(hidden_states)


def load_paced(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> PacedTransformer:
    """Of the module, only its config is read: `paced_seconds`. The log is `steps-PID` in the checkpoint's folder."""
    del device, dtype
    return PacedTransformer(
        float(checkpoint.module_config(name)["paced_seconds"]), checkpoint.path / f"steps-{os.getpid()}"
    )
