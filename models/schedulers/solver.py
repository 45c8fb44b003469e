"""Steps of a denoising loop: Diffusers' scheduler arithmetic, with state that belongs to one request."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from common.artifacts import Schedule
from common.errors import CheckpointError, InvalidInput


class Solver(Protocol):
    """The solver of one request. Its step counter starts where it was built or restored."""

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """Latents after the next step, in the prediction's type."""

    def state(self) -> Mapping[str, Tensor]:
        """What it remembers besides the step counter, on the CPU: a multistep solver's history."""

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Continue after `step` steps with what state() returned then."""


class FlowMatchEulerSolver:
    """First order: each step needs nothing but the latents."""

    def __init__(self, scheduler: Any, schedule: Schedule) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        self._scheduler.timesteps = schedule.timesteps
        self._scheduler.sigmas = schedule.sigmas
        self.restore(0, {})

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """latents + (next sigma - sigma) * velocity, in float32."""
        stepped: Tensor = self._scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return stepped

    def state(self) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Set the step counter. Raises InvalidInput for the state of another solver."""
        if state:
            raise InvalidInput(f"this solver has no state, but got {', '.join(state)}", field="resume_from.solver")
        self._scheduler.set_begin_index(step)


_SOLVERS: Mapping[str, Callable[[Any, Schedule], Solver]] = {"FlowMatchEulerDiscreteScheduler": FlowMatchEulerSolver}


def solver_class(scheduler: Any) -> Callable[[Any, Schedule], Solver]:
    """The solver for a scheduler of Diffusers. Raises CheckpointError for one that cannot be resumed exactly."""
    name = type(scheduler).__name__
    if name not in _SOLVERS:
        raise CheckpointError(f"scheduler {name} is not supported; supported are {', '.join(sorted(_SOLVERS))}")
    if scheduler.config.get("stochastic_sampling"):
        raise CheckpointError("scheduler: stochastic_sampling is not supported; a seed would not fix the result")
    return _SOLVERS[name]
