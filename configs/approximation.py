"""Settings that trade a denoiser's exactness for speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.errors import InvalidInput

LinearDtype = Literal["same", "float8"]


@dataclass(frozen=True)
class Approximation:
    """Approximations of a denoiser; none by default.

    `linear_dtype`: "float8" runs the GEMMs of large linear layers in 8-bit floats; "same" uses the denoiser's dtype.
    `step_cache_threshold`: a step reuses the cached contribution (output minus input) of all blocks but the first, if
    the relative L1 change of the first block's contribution is below this threshold; 0 disables the cache. Raises
    InvalidInput for a negative threshold.
    """

    linear_dtype: LinearDtype = "same"
    step_cache_threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.step_cache_threshold < 0:
            message = f"step_cache_threshold: {self.step_cache_threshold} is not at least 0; 0 disables the step cache"
            raise InvalidInput(message, field="step_cache_threshold")


EXACT = Approximation()
