"""The transformer that takes its time, and the config that names it."""

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
    """Wan's, with another transformer."""

    module_loaders: ClassVar[Mapping[str, str]] = MappingProxyType(
        {**WanPipelineConfig.module_loaders, "WanTransformer3DModel": "paced_config:load_paced"}
    )


class PacedTransformer(DiffusionTransformer):
    """Predicts no change after `seconds`, during which the processor is free, as it is while a GPU computes.

    It writes into `log` when each step begins, in ns of the monotonic clock, a line a step. For the CPU: a CUDA graph
    would sleep only once.
    """

    def __init__(self, seconds: float, log: Path) -> None:
        super().__init__()
        self._seconds = seconds
        self._log = log.open("w", buffering=1)

    def prepare(self, timesteps: Tensor, **conditioning: Any) -> Prepared:
        """Nothing that a step needs; the timesteps have the right number of rows."""
        del conditioning
        return Prepared({"timestep": timesteps}, {})

    def predict(self, hidden_states: Tensor, **inputs: Any) -> Predictions:  # type: ignore[override]
        """Zeros in the shape of the latents."""
        del inputs
        self._log.write(f"{time.monotonic_ns()}\n")
        time.sleep(self._seconds)
        return {"hidden_states": torch.zeros_like(hidden_states)}

    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """None: there are no blocks."""
        del latents, constants
        return 0


def load_paced(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, mesh: WorkerMesh | None = None
) -> PacedTransformer:
    """Of the module, only its config is read: `paced_seconds`. The log is `steps-PID` in the checkpoint's folder."""
    del device, dtype, mesh
    return PacedTransformer(
        float(checkpoint.module_config(name)["paced_seconds"]), checkpoint.path / f"steps-{os.getpid()}"
    )
