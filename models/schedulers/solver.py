"""Solvers of a denoising loop: Diffusers' scheduler arithmetic with state that belongs to one request."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from common.artifacts import Schedule
from common.errors import InvalidInput
from common.package_guard import Attributes, Called, PrivateApi, check_private_api
from models.schedulers.support import check_scheduler


class Solver(Protocol):
    """The solver of one latent part of a request. Its step counter starts at 0 or at the restored step."""

    def step(
        self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Take the next step; the solver determines the result's dtype. Only stochastic solvers use the generator."""

    def state(self) -> Mapping[str, Tensor]:
        """State besides the step counter, such as a multistep solver's history; read-only device tensors."""

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Continue after `step` steps with the state() of that step."""


NewSolver = Callable[[Schedule], Solver]
"""Creates the solver of one latent part of a request."""


_UNIPC = "diffusers:UniPCMultistepScheduler"
_FLOW_MATCH = "diffusers:FlowMatchEulerDiscreteScheduler"
_SET_UNIPC = ("model_outputs", "timestep_list", "last_sample", "lower_order_nums", "_step_index", "num_inference_steps")
PRIVATE_API = {
    "FlowMatchEulerDiscreteScheduler": PrivateApi(
        "diffusers",
        "the Euler solver",
        (Attributes(_FLOW_MATCH, ("timesteps", "sigmas")), Called(f"{_FLOW_MATCH}.set_begin_index", 2)),
    ),
    "UniPCMultistepScheduler": PrivateApi(
        "diffusers",
        "the UniPC solver",
        (Attributes(_UNIPC, ("timesteps", "sigmas", *_SET_UNIPC)), Called(f"{_UNIPC}.set_begin_index", 2)),
    ),
}
"""Attributes and methods of Diffusers' schedulers that the solvers set and call, by class name.

If Diffusers renamed an attribute, setting the old name would have no effect and would raise no error.
"""


def check_empty(state: Mapping[str, Tensor]) -> None:
    """Check that the state of a solver without state is empty. Raises InvalidInput."""
    if state:
        message = f"resume_from.solver: {', '.join(state)} is not the state of this solver, which is empty"
        raise InvalidInput(message, field="resume_from.solver")


class FlowMatchEulerSolver:
    """First-order Euler solver: stateless except for the step counter."""

    def __init__(self, scheduler: Any, schedule: Schedule) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        self._scheduler.timesteps = schedule.timesteps
        self._scheduler.sigmas = schedule.sigmas
        self.restore(0, {})

    def step(
        self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """latents + (next sigma - sigma) * velocity, in float32, converted to the prediction's dtype."""
        del generator
        stepped: Tensor = self._scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return stepped

    def state(self) -> Mapping[str, Tensor]:
        """Empty: the step counter is stored in the step checkpoint."""
        return {}

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Set the step counter. Raises InvalidInput for the state of another solver."""
        check_empty(state)
        self._scheduler.set_begin_index(step)


class UniPCSolver:
    """UniPC: a multistep predictor with a corrector that refines each step with the next prediction.

    The state is the last `solver_order` predictions of the clean latents, newest last, and the latents before the last
    step. The step number determines how many predictions a step uses.
    """

    def __init__(self, scheduler: Any, schedule: Schedule) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        self._scheduler.timesteps = schedule.timesteps
        self._scheduler.sigmas = schedule.sigmas
        self._scheduler.num_inference_steps = schedule.num_inference_steps
        self._device = torch.device("cpu")
        self.restore(0, {})

    def step(
        self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Correct the latents, then take the next step; the result has the latents' dtype."""
        del generator
        self._move(latents.device)
        stepped: Tensor = self._scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return stepped

    def state(self) -> Mapping[str, Tensor]:
        """The history; empty before the first step."""
        scheduler = self._scheduler
        state: dict[str, Tensor] = {
            f"clean_{i}": clean for i, clean in enumerate(scheduler.model_outputs) if clean is not None
        }
        if scheduler.last_sample is not None:
            state["last_sample"] = scheduler.last_sample
        return state

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Set history and step counter. Raises InvalidInput for the state of another solver or step."""
        scheduler = self._scheduler
        order, total = scheduler.config.solver_order, len(scheduler.timesteps)
        known = min(step, order)
        names = {f"clean_{i}" for i in range(order - known, order)} | ({"last_sample"} if step else set())
        if state.keys() != names:
            message = f"resume_from.solver: {sorted(state)} is not the state at step {step}, which is {sorted(names)}"
            raise InvalidInput(message, field="resume_from.solver")
        scheduler.model_outputs = [state.get(f"clean_{i}") for i in range(order)]
        scheduler.timestep_list = [None] * order
        scheduler.last_sample = state.get("last_sample")
        scheduler.lower_order_nums = known
        left = total - (step - 1) if scheduler.config.lower_order_final else order
        scheduler.this_order = min(order, left, step)
        scheduler.set_begin_index(step)
        scheduler._step_index = None

    def _move(self, device: torch.device) -> None:
        """Move a restored history to the latents' device."""
        if device != self._device:
            scheduler, self._device = self._scheduler, device
            scheduler.model_outputs = [each if each is None else each.to(device) for each in scheduler.model_outputs]
            if scheduler.last_sample is not None:
                scheduler.last_sample = scheduler.last_sample.to(device)


_SOLVERS: Mapping[str, Callable[[Any, Schedule], Solver]] = {
    "FlowMatchEulerDiscreteScheduler": FlowMatchEulerSolver,
    "UniPCMultistepScheduler": UniPCSolver,
}


def solver_class(scheduler: Any) -> Callable[[Any, Schedule], Solver]:
    """Return the solver class of a Diffusers scheduler.

    Raises CheckpointError for a scheduler that cannot be resumed exactly, and UnsupportedPackage if Diffusers' private
    attributes have changed.
    """
    name = type(scheduler).__name__
    check_scheduler(name, scheduler.config)
    check_private_api(PRIVATE_API[name])
    return _SOLVERS[name]
