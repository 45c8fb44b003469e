"""Builds the schedule of the denoising loop."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from common.artifacts import Sampling, Schedule
from common.errors import InvalidInput
from common.stage import Call, PipelineStage
from configs.pipeline_configs.base import PreparationConfig
from models.composition import SCHEDULER
from models.contracts import TimestepPreparationInput, TimestepPreparationOutput
from models.runtime import Runtime


class TimestepPreparationStage(PipelineStage[TimestepPreparationInput, TimestepPreparationOutput]):
    """Builds the model's own schedule, or the scheduler's schedule from the model's sigmas and mu."""

    def __init__(self, config: PreparationConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:  # noqa: ARG002  (all stages have one signature)
        self._config = config
        self._scheduler = modules.get(SCHEDULER)

    @torch.inference_mode()
    def run(self, x: TimestepPreparationInput, call: Call) -> TimestepPreparationOutput:
        """Return the schedule; with custom sigmas, their number is the number of steps.

        Raises InvalidInput for non-finite noise levels, as the result would be NaN.
        """
        call.check_cancelled()
        if (steps := self._config.own_schedule(x.sampling)) is not None:
            return TimestepPreparationOutput(schedule=_schedule_of(steps))
        scheduler: Any = copy.deepcopy(self._scheduler)
        assert scheduler is not None, "a pipeline without a scheduler defines its own schedule"
        sigmas, mu = self._config.sigmas(x.sampling), self._config.mu_of_steps(x.canvas, x.sampling)
        # Non-finite values are checked below; NumPy's warnings about a division by zero would only clutter the log.
        with np.errstate(divide="ignore", invalid="ignore"):
            if sigmas is None:
                scheduler.set_timesteps(x.sampling.num_inference_steps, mu=mu)
            else:
                timesteps = self._config.timesteps(x.sampling)
                given = {} if timesteps is None else {"timesteps": list(timesteps)}
                scheduler.set_timesteps(sigmas=list(sigmas), mu=mu, **given)
        if not bool(torch.isfinite(scheduler.sigmas).all() and torch.isfinite(scheduler.timesteps).all()):
            raise _not_finite(x.sampling)
        schedule = Schedule(
            timesteps=scheduler.timesteps, sigmas=scheduler.sigmas, num_inference_steps=len(scheduler.timesteps)
        )
        return TimestepPreparationOutput(schedule=schedule)


def _schedule_of(steps: Sequence[tuple[float, float]]) -> Schedule:
    """A schedule from pairs of timestep and noise level; the last step ends at noise level 0."""
    timesteps, sigmas = zip(*steps, strict=True)
    return Schedule(
        timesteps=torch.tensor(timesteps, dtype=torch.float32),
        sigmas=torch.tensor((*sigmas, 0.0), dtype=torch.float32),
        num_inference_steps=len(steps),
    )


def _not_finite(sampling: Sampling) -> InvalidInput:
    steps, field = sampling.num_inference_steps, "sigmas" if sampling.sigmas else "num_inference_steps"
    message = f"{field}: {sampling.sigmas or steps} results in non-finite noise levels with this model's scheduler"
    return InvalidInput(f"{message}; more steps work", field=field)
