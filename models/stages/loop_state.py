"""State of a denoising loop: latents, solvers and generator."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from common.artifacts import Generator, LatentPart, Latents, StepCheckpoint
from common.errors import InvalidInput
from models.contracts import DenoisingInput
from models.schedulers.solver import NewSolver, Solver
from models.stages.snapshots import on_cpu

_LATENTS = "latents"
_FIELD = "resume_from"


@dataclass
class LoopState:
    """State after `step` steps, with one solver for each latent part.

    Stochastic solvers draw from `generator`. A loop over blocks of frames takes all steps of the schedule for each
    block; its solvers restart at each block.
    """

    step: int
    latents: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    solvers: Mapping[str, Solver]
    timesteps: Tensor
    seed: int
    generator: torch.Generator | None

    @classmethod
    def of(cls, x: DenoisingInput, parts: Collection[str], new_solver: NewSolver, blocks: int = 1) -> Self:
        """Initial state of a loop over `blocks` blocks, or the state in resume_from, on the CPU.

        Raises InvalidInput for a checkpoint of a different loop.
        """
        noise = {part: x.initial_latents.parts[part] for part in parts}
        state = cls(
            step=0,
            latents={part: each.latents for part, each in noise.items()},
            shapes={part: each.raw_latent_shape for part, each in noise.items()},
            solvers={part: new_solver(x.schedule) for part in parts},
            timesteps=x.schedule.timesteps,
            seed=x.sampling.seed,
            generator=_generator(x.latents_generator),
        )
        if x.resume_from is not None:
            state._restore(x.resume_from, x.schedule.num_inference_steps * blocks)
        return state

    def _restore(self, saved: StepCheckpoint, total: int) -> None:
        if not 0 <= saved.step <= total:
            raise InvalidInput(f"resume_from.step: {saved.step} is not from 0 to {total}", field=f"{_FIELD}.step")
        latents: dict[str, Tensor] = {}
        for part, noise in self.latents.items():
            found = saved.latents.parts.get(part)
            if found is None or found.latents.shape != noise.shape:
                shape = None if found is None else tuple(found.latents.shape)
                message = f"resume_from.latents: shape {shape} of {part} is not {tuple(noise.shape)}"
                raise InvalidInput(message, field=f"{_FIELD}.latents")
            latents[part] = found.latents
        for part, solver in self.solvers.items():
            solver.restore(saved.step, _of_part(part, saved.solver))
        if unknown := sorted(name for name in saved.solver if name.partition(".")[0] not in self.solvers):
            raise InvalidInput(
                f"resume_from.solver: {', '.join(unknown)} is not the state of a solver of this loop",
                field=f"{_FIELD}.solver",
            )
        if (self.generator is None) != (saved.generator is None):
            raise InvalidInput(
                "resume_from.generator: a generator is required if, and only if, the loop draws noise",
                field=f"{_FIELD}.generator",
            )
        self.generator = _generator(saved.generator)
        self.step, self.latents = saved.step, latents

    def to(self, device: torch.device) -> Self:
        """Move latents and timesteps to the device; solvers move their state in their first step."""
        self.latents = {part: each.to(device) for part, each in self.latents.items()}
        self.timesteps = self.timesteps.to(device)
        return self

    def advance(self, predictions: Mapping[str, Tensor], frames: slice | None = None) -> None:
        """Take a step of all latent parts with their predictions.

        With `frames`, only this block of the latents (B, channels, frames, ...) takes a step; the predictions have the
        block's shape.
        """
        timestep = self.timesteps[self.step % len(self.timesteps)]
        now = self.latents if frames is None else self.block(frames)
        stepped = {
            part: solver.step(predictions[part], timestep, now[part], self.generator)
            for part, solver in self.solvers.items()
        }
        self.latents = stepped if frames is None else self._with_block(frames, stepped)
        self.step += 1

    def block(self, frames: slice) -> dict[str, Tensor]:
        """The latents of a range of frames, by part."""
        return {part: each[:, :, frames] for part, each in self.latents.items()}

    def _with_block(self, frames: slice, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Latents with a block replaced, as copies: checkpoints may still refer to the old tensors."""
        whole = {part: each.clone() for part, each in self.latents.items()}
        for part, each in block.items():
            whole[part][:, :, frames] = each
        return whole

    def step_checkpoint(self) -> StepCheckpoint:
        """Checkpoint of the current state on the CPU; later steps do not modify its tensors."""
        solver = {f"{part}.{name}": each for part, own in self.solvers.items() for name, each in own.state().items()}
        copies = on_cpu({**solver, **{f"{_LATENTS}.{part}": each for part, each in self.latents.items()}})
        latents = {part: copies.pop(f"{_LATENTS}.{part}") for part in self.latents}
        generator = self.generator_artifact()
        return StepCheckpoint(step=self.step, latents=self.artifact(latents), solver=copies, generator=generator)

    def generator_artifact(self) -> Generator | None:
        """The generator's current state."""
        return None if self.generator is None else Generator(seed=self.seed, state=self.generator.get_state())

    def artifact(self, latents: Mapping[str, Tensor]) -> Latents:
        """The latents of all parts as an artifact."""
        return Latents(
            parts={part: LatentPart(latents=each, raw_latent_shape=self.shapes[part]) for part, each in latents.items()}
        )


def _of_part(part: str, solver: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of one part's solver."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): each for name, each in solver.items() if name.startswith(prefix)}


def _generator(artifact: Generator | None) -> torch.Generator | None:
    """Create a generator with the artifact's state."""
    if artifact is None:
        return None
    generator = torch.Generator("cpu")
    generator.set_state(artifact.state)
    return generator
