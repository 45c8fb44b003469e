"""The solver computes the scheduler's steps, and each request has its own state."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from common.artifacts import Schedule
from common.errors import CheckpointError
from models.schedulers.solver import solver_class

SIGMAS = torch.tensor([1.0, 0.8, 0.3, 0.0])
SCHEDULE = Schedule(timesteps=SIGMAS[:-1] * 1000, sigmas=SIGMAS, num_inference_steps=3)


def test_euler_integrates_the_velocity() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    solver = solver_class(scheduler)(scheduler, SCHEDULE)
    latents = torch.ones(1, 2)
    for t in SCHEDULE.timesteps:
        latents = solver.step(torch.full((1, 2), 2.0), t, latents)
    torch.testing.assert_close(latents, torch.full((1, 2), -1.0))


def test_concurrent_requests_have_separate_states() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    first, second = (solver_class(scheduler)(scheduler, SCHEDULE) for _ in range(2))
    latents, velocity, t = torch.ones(1), torch.ones(1), SCHEDULE.timesteps[0]
    stepped = first.step(velocity, t, latents)
    assert torch.equal(second.step(velocity, t, latents), stepped)
    assert not torch.equal(first.step(velocity, t, latents), stepped)


def test_equal_timesteps_are_separate_steps() -> None:
    """A custom schedule may repeat a noise level, so steps are identified by index and not by timestep."""
    sigmas = torch.tensor([0.5, 0.5, 0.25, 0.0])
    scheduler = FlowMatchEulerDiscreteScheduler()
    schedule = Schedule(timesteps=sigmas[:-1] * 1000, sigmas=sigmas, num_inference_steps=3)
    solver = solver_class(scheduler)(scheduler, schedule)
    latents = torch.zeros(1)
    for t in schedule.timesteps:
        latents = solver.step(torch.ones(1), t, latents)
    torch.testing.assert_close(latents, torch.tensor([-0.5]))


def test_a_scheduler_without_a_solver_is_refused() -> None:
    with pytest.raises(CheckpointError, match="DDIMScheduler is not supported; supported: Flow"):
        solver_class(DDIMScheduler())
