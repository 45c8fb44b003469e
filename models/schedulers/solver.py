"""Steps of a denoising loop: Diffusers' scheduler arithmetic, with state that belongs to one request."""

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
    """The solver of one latent part of a request. Its step counter starts where it was built or restored."""

    def step(
        self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Latents after the next step, in the prediction's dtype. Only stochastic solvers draw from the generator."""

    def state(self) -> Mapping[str, Tensor]:
        """What it remembers besides the step counter: a multistep solver's history, on the device, never written to."""

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Continue after `step` steps with what state() returned then."""


NewSolver = Callable[[Schedule], Solver]
"""Makes the solver of one latent part of a request."""


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
"""Attributes of Diffusers' schedulers that the solvers set: under another name they would change nothing."""


class FlowMatchEulerSolver:
    """First order: each step needs nothing but the latents."""

    def __init__(self, scheduler: Any, schedule: Schedule) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        self._scheduler.timesteps = schedule.timesteps
        self._scheduler.sigmas = schedule.sigmas
        self.restore(0, {})

    def step(
        self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """latents + (next sigma - sigma) * velocity, in float32."""
        del generator
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


class UniPCSolver:
    """UniPC: a multistep predictor, and a corrector that improves each step once the next prediction is known.

    It remembers the last predictions of the clean latents, as many as its order, newest last, and the latents that
    the last step began with. How many of them a step uses follows from the step's number.
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
        """Correct the latents, then predict the next ones; in the latents' dtype."""
        del generator
        self._move(latents.device)
        stepped: Tensor = self._scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return stepped

    def state(self) -> Mapping[str, Tensor]:
        """The history; nothing before the first step."""
        scheduler = self._scheduler
        state: dict[str, Tensor] = {
            f"clean_{i}": clean for i, clean in enumerate(scheduler.model_outputs) if clean is not None
        }
        if scheduler.last_sample is not None:
            state["last_sample"] = scheduler.last_sample
        return state

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Set history and step counter. Raises InvalidInput unless the state is that of this solver at that step."""
        scheduler = self._scheduler
        order, total = scheduler.config.solver_order, len(scheduler.timesteps)
        known = min(step, order)
        names = {f"clean_{i}" for i in range(order - known, order)} | ({"last_sample"} if step else set())
        if state.keys() != names:
            message = f"step {step} needs {sorted(names)}, but the state has {sorted(state)}"
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
        """Bring a restored history to where the latents are."""
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
    """The solver for a scheduler of Diffusers.

    Raises CheckpointError for one that cannot be resumed exactly, UnsupportedPackage for a changed Diffusers.
    """
    name = type(scheduler).__name__
    check_scheduler(name, scheduler.config)
    check_private_api(PRIVATE_API[name])
    return _SOLVERS[name]
