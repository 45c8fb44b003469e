"""Bounds that `shift_terminal` of a scheduler sets: it stretches the schedule so that it ends at that noise level."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.checkpoint import Checkpoint

_HIGHEST_LAST_SIGMA = 0.9999


def check_stretched(checkpoint: Checkpoint, steps: int, sigmas: Sequence[float] = ()) -> None:
    """Refuse a schedule that cannot be stretched: Diffusers divides 0 by 0 there, and every pixel is NaN.

    Raises InvalidInput.
    """
    if not checkpoint.config_of("scheduler").get("shift_terminal"):
        return
    if sigmas and sigmas[-1] > _HIGHEST_LAST_SIGMA:
        message = f"the last of sigmas must be below {_HIGHEST_LAST_SIGMA}, but is {sigmas[-1]}"
        raise InvalidInput(f"{message}; this model's schedule is stretched from 1 to it", field="sigmas")
    if steps < 2 and not sigmas:
        message = "num_inference_steps must be at least 2, because this model's schedule has two fixed ends"
        raise InvalidInput(f"{message}, but is {steps}", field="num_inference_steps")
