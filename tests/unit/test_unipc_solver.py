"""UniPC computes the steps of Diffusers' scheduler, and resumes after any step to the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from common.artifacts import Schedule
from common.errors import CheckpointError, InvalidInput
from models.schedulers.solver import UniPCSolver, solver_class


def scheduler_of(**given: Any) -> UniPCMultistepScheduler:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return UniPCMultistepScheduler(**{**flow, **given})


def schedule_of(scheduler: UniPCMultistepScheduler, steps: int) -> Schedule:
    scheduler.set_timesteps(steps)
    return Schedule(timesteps=scheduler.timesteps, sigmas=scheduler.sigmas, num_inference_steps=steps)


def predict(latents: Tensor, step: int) -> Tensor:
    """A prediction that depends on the step and the latents, like the prediction of a model."""
    return torch.sin(3 * latents + step)


def run(
    step: Callable[[Tensor, Tensor, Tensor], Tensor], schedule: Schedule, latents: Tensor, start: int = 0
) -> Tensor:
    for number in range(start, schedule.num_inference_steps):
        latents = step(predict(latents, number), schedule.timesteps[number], latents)
    return latents


CONFIGS: list[dict[str, Any]] = [
    {},
    {"solver_order": 3},
    {"solver_order": 1},
    {"lower_order_final": False},
    {"disable_corrector": [0, 1]},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_steps_equal_those_of_the_scheduler(config: dict[str, Any], steps: int) -> None:
    scheduler = scheduler_of(**config)
    schedule = schedule_of(scheduler, steps)
    noise = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    ours = run(UniPCSolver(scheduler, schedule).step, schedule, noise)
    scheduler.set_begin_index(0)
    expected = run(lambda *given: scheduler.step(*given, return_dict=False)[0], schedule, noise)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_loop_resumed_after_any_step_gives_the_same_bytes(config: dict[str, Any]) -> None:
    scheduler = scheduler_of(**config)
    schedule = schedule_of(scheduler, 7)
    noise = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = run(UniPCSolver(scheduler, schedule).step, schedule, noise)
    first, latents = UniPCSolver(scheduler, schedule), noise
    for stopped in range(8):
        second = UniPCSolver(scheduler_of(**config), schedule)
        second.restore(stopped, {name: value.clone() for name, value in first.state().items()})
        assert torch.equal(run(second.step, schedule, latents, stopped), expected), f"stopped after {stopped}"
        if stopped < 7:
            latents = first.step(predict(latents, stopped), schedule.timesteps[stopped], latents)


def test_a_loop_resumed_without_its_history_gives_other_bytes() -> None:
    scheduler = scheduler_of()
    schedule = schedule_of(scheduler, 4)
    solver, latents = UniPCSolver(scheduler, schedule), torch.ones(1, 4, 1, 1, 1)
    for step in range(2):
        latents = solver.step(predict(latents, step), schedule.timesteps[step], latents)
    zeroed = {name: torch.zeros_like(value) for name, value in solver.state().items()}
    other = UniPCSolver(scheduler, schedule)
    other.restore(2, zeroed)
    assert not torch.equal(run(other.step, schedule, latents, 2), run(solver.step, schedule, latents, 2))


def test_concurrent_requests_have_separate_states() -> None:
    scheduler = scheduler_of()
    schedule = schedule_of(scheduler, 5)
    noises = [torch.full((1, 4, 1, 1, 1), value) for value in (0.5, -1.0)]
    alone = [run(UniPCSolver(scheduler, schedule).step, schedule, noise) for noise in noises]
    solvers = [UniPCSolver(scheduler, schedule) for _ in noises]
    together = list(noises)
    for step, timestep in enumerate(schedule.timesteps):
        together = [
            solver.step(predict(latents, step), timestep, latents)
            for solver, latents in zip(solvers, together, strict=True)
        ]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(("step", "names"), [(0, {"last_sample"}), (2, set()), (1, {"clean_0", "last_sample"})])
def test_the_state_of_another_step_is_refused(step: int, names: set[str]) -> None:
    scheduler = scheduler_of()
    solver = UniPCSolver(scheduler, schedule_of(scheduler, 4))
    with pytest.raises(InvalidInput, match=f"at step {step}, which is") as caught:
        solver.restore(step, dict.fromkeys(names, torch.zeros(1)))
    assert caught.value.field == "resume_from.solver"


def test_a_scheduler_with_a_separate_predictor_is_refused() -> None:
    scheduler = scheduler_of(solver_p=scheduler_of())
    with pytest.raises(CheckpointError, match="solver_p is not supported"):
        solver_class(scheduler)
