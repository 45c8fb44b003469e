"""Sampling parameters of models with custom noise levels."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

from common.errors import InvalidInput
from configs.sample.base import ParamWarning, SamplingParams, parameter

_SMALLEST_SIGMA = 1e-6


@dataclass(frozen=True, kw_only=True)
class SigmasSamplingParams(SamplingParams):
    """Parameters with custom sigmas, which may replace the evenly spaced noise levels."""

    sigmas: tuple[float, ...] = parameter(
        "Noise levels of the steps, descending; sets the number of steps.",
        (),
        minimum=_SMALLEST_SIGMA,
        maximum=1.0,
    )

    def with_steps_of_sigmas(self, given: Collection[str]) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Set the number of steps to the number of sigmas; warn if the caller set a different number.

        Raises InvalidInput for sigmas that increase.
        """
        if not self.sigmas:
            return self, ()
        for earlier, later in pairwise(self.sigmas):
            if later > earlier:
                raise InvalidInput(
                    f"sigmas: {later} after {earlier} is not in descending order; sigmas from high to low work",
                    field="sigmas",
                )
        steps = len(self.sigmas)
        rounded = replace(self, num_inference_steps=steps)
        if "num_inference_steps" not in given or self.num_inference_steps == steps:
            return rounded, ()
        message = f"{self.num_inference_steps} is not the number of sigmas; {steps} is used instead"
        return rounded, (ParamWarning("num_inference_steps", message),)
