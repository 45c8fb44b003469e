"""A transformer that only sleeps, and its pipeline config."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from configs.pipeline_configs.wan import WanPipelineConfig
from models.dits.base import DiffusionTransformer, Predictions, Prepared

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from models.parallel.mesh import WorkerMesh


@dataclass(frozen=True, kw_only=True)
class PacedWanPipelineConfig(WanPipelineConfig):
    """Wan's pipeline config with another transformer class."""

    module_loaders: ClassVar[Mapping[str, str]] = MappingProxyType(
        {**WanPipelineConfig.module_loaders, "WanTransformer3DModel": "paced_config:load_paced"}
    )


class PacedTransformer(DiffusionTransformer):
    """Sleeps for `seconds` and predicts zeros; the CPU is idle meanwhile, as while a GPU computes.

    It appends the start time of each step to `log`, one line per step, in ns of the monotonic clock. It runs on the CPU
    only, as a CUDA graph would sleep only at its capture.
    """

    def __init__(self, seconds: float, log: Path) -> None:
        super().__init__()
        self._seconds = seconds
        self._log = log.open("w", buffering=1)

    def prepare(self, timesteps: Tensor, **conditioning: Any) -> Prepared:
        """Prepare rows of timesteps; steps need no other inputs."""
        del conditioning
        return Prepared({"timestep": timesteps}, {})

    def predict(self, hidden_states: Tensor, **inputs: Any) -> Predictions:  # type: ignore[override]
        """Sleep and return zeros in the shape of the latents."""
        del inputs
        self._log.write(f"{time.monotonic_ns()}\n")
        time.sleep(self._seconds)
        return {"hidden_states": torch.zeros_like(hidden_states)}

    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """0, as there are no blocks to cache."""
        del latents, constants
        return 0


def load_paced(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None
) -> PacedTransformer:
    """Read only `paced_seconds` of the module's config. The log is `steps-PID` in the checkpoint's folder."""
    del device, dtype, mesh
    return PacedTransformer(
        float(checkpoint.module_config(name)["paced_seconds"]), checkpoint.path / f"steps-{os.getpid()}"
    )
