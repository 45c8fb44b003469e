"""Bounds of schedules that the scheduler stretches to end at the noise level `shift_terminal`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.checkpoint import Checkpoint

_HIGHEST_LAST_SIGMA = 0.9999


def check_stretched(checkpoint: Checkpoint, steps: int, sigmas: Sequence[float] = ()) -> None:
    """Check that the schedule can be stretched; otherwise all pixels would be NaN, as in Diffusers.

    Raises InvalidInput.
    """
    if not checkpoint.config_of("scheduler").get("shift_terminal"):
        return
    if sigmas and sigmas[-1] > _HIGHEST_LAST_SIGMA:
        message = f"sigmas: {sigmas[-1]}, the last value, is not at most {_HIGHEST_LAST_SIGMA}"
        raise InvalidInput(f"{message}; this model stretches the schedule between 1 and the last value", field="sigmas")
    if steps < 2 and not sigmas:
        message = f"num_inference_steps: {steps} is not at least 2"
        raise InvalidInput(f"{message}; this model's schedule has two fixed ends", field="num_inference_steps")
