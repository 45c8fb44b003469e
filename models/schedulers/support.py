"""Which schedulers the denoising loop supports, decided from their configuration alone: no torch is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import CheckpointError

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler")


def check_scheduler(class_name: str, config: Mapping[str, Any]) -> None:
    """Refuse a scheduler that cannot be resumed exactly. Raises CheckpointError."""
    if class_name not in SCHEDULERS:
        supported = ", ".join(SCHEDULERS)
        raise CheckpointError(f"scheduler: {class_name} is not supported; supported schedulers are {supported}")
    if config.get("stochastic_sampling"):
        raise CheckpointError("scheduler: stochastic_sampling is not supported; a seed would not fix the result")
    if config.get("solver_p") is not None:
        raise CheckpointError("scheduler: solver_p is not supported; UniPC's own predictor is")
