"""Where a denoiser may trade exactness for speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LinearDtype = Literal["same", "float8"]


@dataclass(frozen=True)
class Approximation:
    """What a denoiser leaves out of the exact computation: nothing, unless its settings say otherwise.

    `linear_dtype`: "float8" has the large linear layers multiply 8-bit floats; "same" is the type of all else.
    `step_cache_threshold`: a step whose first block changes less than this (relative L1) reuses what the other blocks
    did at an earlier step; 0 computes every step.
    """

    linear_dtype: LinearDtype = "same"
    step_cache_threshold: float = 0.0


EXACT = Approximation()
