"""A denoiser for loop tests: two latent parts, two experts, four branches, step memory, noisy steps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from common.artifacts import Canvas, Conditioning, Generator, LatentPart, Latents, Sampling, Schedule
from common.checkpoint import Checkpoint
from common.errors import InvalidInput
from configs.pipeline_configs.base import DenoisingConfig, Keywords, Parts, Shapes, Step
from models.contracts import DenoisingInput
from models.dits.base import DiffusionTransformer, MemorySpec, Predictions, Prepared
from models.layers.step_cache import CacheUse
from models.runtime import Runtime
from models.stages.denoising import DenoisingStage

STEPS = 5
SHAPES: Shapes = {"video": (2, 3, 4), "audio": (2, 5)}


class LoopTransformer(DiffusionTransformer):
    """Predicts a mix of its inputs that depends on the expert, the branch flag and earlier steps."""

    block_linears = ()

    def __init__(self, gain: float, *, remembers: bool = False) -> None:
        super().__init__()
        self.gain = gain
        self.remembers = remembers
        self.eager_calls = 0

    def prepare(self, timesteps: Tensor, **conditioning: Any) -> Prepared:
        """Prepare step memory: timesteps as table rows, the text as a constant, a running sum as state."""
        memory = {"total": MemorySpec(SHAPES["video"], torch.float32)} if self.remembers else {}
        return Prepared({"time": timesteps}, {"text": conditioning["text"]}, memory)

    def predict(  # type: ignore[override]  # inputs differ by model
        self,
        video: Tensor,
        sound: Tensor,
        time: Tensor,
        text: Tensor,
        total: Tensor | None = None,
        skipped: int = 0,
        use: CacheUse | None = None,
    ) -> Predictions:
        """Predict both latent parts."""
        del use
        self.eager_calls += 1
        level = self.gain * time.float().mean() / 1000 + text.mean() - skipped
        if total is not None:
            total.add_(video)
            level = level + total.mean()
        return {"video": video.sin() * level + sound.mean(), "sound": sound.cos() * level + video.mean()}

    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """Return 0, as this model has no residual cache."""
        del latents, constants
        return 0


@dataclass(frozen=True, kw_only=True)
class LoopConfig(DenoisingConfig):
    """A config in which every callback changes the loop's result or is recorded in `calls`."""

    part_keywords: ClassVar[Mapping[str, str]] = {"video": "video", "audio": "sound"}
    transformers: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2")
    branches: ClassVar[tuple[str, ...]] = ("positive", "negative", "perturbed", "isolated")
    calls: list[str] = field(default_factory=list)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Raise InvalidInput, as there is no checkpoint of this family."""
        raise InvalidInput(f"{checkpoint.name} is not for this config")

    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """Return the fixed shapes."""
        del canvas, batch
        return SHAPES

    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """One conditioning tensor, "text"."""
        return {"text": (1, 3)}

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Return no model arguments."""
        del embeds, sampling
        assert shapes == SHAPES
        return {}

    def model_timestep(self, timesteps: Tensor) -> Tensor:
        """Return the timesteps unchanged."""
        return timesteps

    def expert(self, step: Step) -> str:
        """Return the second expert for noise levels of at most 0.5."""
        return "transformer" if step.sigma["video"] > 0.5 else "transformer_2"

    def branch_flags(self, branch: str, sampling: Sampling) -> Mapping[str, Hashable]:
        """Return the flag `skipped` for the perturbed branch; the flag changes the prediction."""
        del sampling
        return {"skipped": 1} if branch == "perturbed" else {}

    def active(self, step: Step, branches: Sequence[str], sampling: Sampling) -> Sequence[str]:
        """Return all branches in even steps, only the positive branch in odd steps."""
        del sampling
        return branches if step.index % 2 == 0 else branches[:1]

    def before_step(self, step: Step, latents: Parts, conditions: Parts) -> Parts:
        """Record the step."""
        del conditions
        self.calls.append(f"before {step.index}")
        return latents

    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """Return the weighted sum of branches and latents, divided by the guidance scale.

        Branches are weighted by their order, latents by the next sigma.
        """
        self.calls.append(f"guide {step.index} {' '.join(predictions)}")
        return {
            part: sum(
                (weight * each[part] for weight, each in enumerate(predictions.values(), 1)),
                latents[part] * step.next_sigma[part],
            )
            / (sampling.guidance_scale or 1.0)
            for part in latents
        }

    def after_step(self, step: Step, latents: Parts, conditions: Parts) -> Parts:
        """Record the step."""
        del conditions
        self.calls.append(f"after {step.index}")
        return latents

    def after_loop(self, latents: Parts, conditions: Parts) -> Parts:
        """Add 1 to the latents."""
        del conditions
        self.calls.append("after loop")
        return {part: each + 1 for part, each in latents.items()}


class NoisySolver:
    """An Euler step with noise from the request's generator; its state is the last prediction."""

    def __init__(self, _: object, schedule: Schedule) -> None:
        self._sigmas = schedule.sigmas.tolist()
        self._last: Tensor | None = None
        self._step = 0

    def step(
        self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Step with the mean of this prediction and the previous prediction."""
        del timestep
        now, after = self._sigmas[self._step : self._step + 2]
        used = prediction if self._last is None else (prediction + self._last) / 2
        self._last, self._step = prediction, self._step + 1
        assert generator is not None, "the request has a generator"
        noise = torch.randn(latents.shape, generator=generator)
        stepped: Tensor = latents + (after - now) * used + 0.1 * after * noise
        return stepped

    def state(self) -> Mapping[str, Tensor]:
        """The last prediction."""
        return {} if self._last is None else {"last": self._last}

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Restore the previous prediction."""
        self._step, self._last = step, state.get("last")


def loop_stage(runtime: Runtime | None = None, *, remembers: bool = False) -> tuple[DenoisingStage, LoopConfig]:
    """A denoising stage with two experts of equal shape, and noise in every step."""
    config = LoopConfig()
    modules = {
        "transformer": LoopTransformer(1.0, remembers=remembers),
        "transformer_2": LoopTransformer(-0.5, remembers=remembers),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }
    stage = DenoisingStage(config, runtime or Runtime(), modules)
    stage._new_solver = partial(NoisySolver, None)
    return stage, config


def loop_input(seed: int = 0) -> DenoisingInput:
    """A request with a negative prompt."""
    generator = torch.Generator("cpu").manual_seed(seed)
    parts = {
        part: LatentPart(latents=torch.randn(shape, generator=generator), raw_latent_shape=shape)
        for part, shape in SHAPES.items()
    }
    sigmas = torch.linspace(1.0, 0.0, STEPS + 1)
    return DenoisingInput(
        initial_latents=Latents(parts=parts),
        schedule=Schedule(timesteps=1000 * sigmas[:-1], sigmas=sigmas, num_inference_steps=STEPS),
        text_conditioning=Conditioning(
            prompt_embeds={"text": torch.randn(1, 3, generator=generator)},
            negative_prompt_embeds={"text": torch.randn(1, 3, generator=generator)},
        ),
        sampling=Sampling(num_inference_steps=STEPS, seed=seed, num_outputs_per_prompt=2, guidance_scale=4.0),
        latents_generator=Generator(seed=seed, state=generator.get_state()),
    )
