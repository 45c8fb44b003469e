"""Sampling parameters of models that take the noise levels of their steps."""

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
    """Custom sigmas may replace the even spacing of steps."""

    sigmas: tuple[float, ...] = parameter(
        "Noise level of each step, highest first; sets the number of steps.", (), minimum=_SMALLEST_SIGMA, maximum=1.0
    )

    def with_steps_of_sigmas(self, given: Collection[str]) -> tuple[Self, tuple[ParamWarning, ...]]:
        """As many steps as sigmas, with a warning where the caller asked for another number.

        Raises InvalidInput for sigmas that rise.
        """
        if not self.sigmas:
            return self, ()
        for earlier, later in pairwise(self.sigmas):
            if later > earlier:
                raise InvalidInput(f"sigmas must not rise, but {later} follows {earlier}", field="sigmas")
        steps = len(self.sigmas)
        rounded = replace(self, num_inference_steps=steps)
        if "num_inference_steps" not in given or self.num_inference_steps == steps:
            return rounded, ()
        message = f"sigmas has {steps} values, so {steps} steps are taken instead of {self.num_inference_steps}"
        return rounded, (ParamWarning("num_inference_steps", message),)
