"""Checks whether the denoising loop supports a scheduler, from its config, without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import CheckpointError

SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler")


def check_scheduler(class_name: str, config: Mapping[str, Any]) -> None:
    """Check that the loop can run the scheduler and resume it exactly. Raises CheckpointError."""
    if class_name not in SCHEDULERS:
        supported = ", ".join(SCHEDULERS)
        raise CheckpointError(f"scheduler: {class_name} is not supported; supported: {supported}")
    if config.get("stochastic_sampling"):
        raise CheckpointError(
            "scheduler: stochastic_sampling: true is not supported, as the seed would not determine the result; "
            "false works"
        )
    if config.get("solver_p") is not None:
        raise CheckpointError("scheduler: solver_p is not supported; null, which means UniPC's own predictor, works")
