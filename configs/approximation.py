"""Where a denoiser may trade exactness for speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.errors import InvalidInput

LinearDtype = Literal["same", "float8"]


@dataclass(frozen=True)
class Approximation:
    """What a denoiser leaves out of the exact computation: nothing, unless its settings say otherwise.

    `linear_dtype`: "float8" has the large linear layers multiply 8-bit floats; "same" is the type of all else.
    `step_cache_threshold`: a step whose first block changes less than this (relative L1) reuses what the other blocks
    did at an earlier step; 0 computes every step. Raises InvalidInput for less than 0.
    """

    linear_dtype: LinearDtype = "same"
    step_cache_threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.step_cache_threshold < 0:
            message = f"step_cache_threshold is {self.step_cache_threshold}; it must be 0 (off) or more"
            raise InvalidInput(message, field="step_cache_threshold")


EXACT = Approximation()
