"""The denoising loop. It knows no model: what differs between models, it asks the config."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from typing import Any

import torch
from prometheus_client import Counter
from torch import Tensor

from common.artifacts import Conditioning, DenoiseState, LatentPart, Latents, Sampling
from common.errors import InvalidInput
from common.stage import Call, PipelineStage
from configs.pipeline_configs.base import StandardPipelineConfig
from models.contracts import DenoisingInput, DenoisingOutput
from models.layers.mesh import Axis
from models.schedulers.solver import Solver, solver_class
from models.stages.pacing import paced_steps
from models.stages.prediction import Branch, Branches, StepCaching, StepGraphs
from models.stages.snapshots import on_cpu

Keywords = dict[str, Tensor | None]
_LATENTS = "latents"
_log = logging.getLogger(__name__)

STEPS_REUSED = Counter("fleet_steps_reused", "Predictions that took most blocks' work from earlier steps")


class DenoisingStage(PipelineStage[DenoisingInput, DenoisingOutput]):
    """Predicts and steps until the schedule ends, one or two predictions a step."""

    def __init__(self, config: StandardPipelineConfig, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._transformer = modules["transformer"]
        self._scheduler = modules["scheduler"]
        self._solver_class = solver_class(self._scheduler)
        self._graphs = StepGraphs() if config.device.type == "cuda" else None
        self._cfg = Axis() if config.mesh is None else config.mesh.axis("cfg")
        self._caching = _step_caching(config)

    @torch.inference_mode()
    def run(self, x: DenoisingInput, call: Call) -> DenoisingOutput:
        """Denoise all outputs as one batch.

        Reports every step, ends within one when cancelled, and continues after resume_from.step to the same bytes. In a
        worker group all ranks run it together, on equal inputs, and get equal outputs. With a step cache it neither
        tells checkpoints nor continues: what the cache holds is not part of them.
        """
        device = self._config.device
        shape = x.initial_latents.parts[self._config.latent_part].raw_latent_shape
        timesteps = x.schedule.timesteps.to(device)
        prepare = [
            partial(self._branch, keywords, timesteps, x.sampling) for keywords in self._keywords_of_branches(x, shape)
        ]
        with closing(Branches(prepare, self._cfg)) as branches:
            return self._loop(x, call, branches, timesteps, shape)

    def _loop(
        self, x: DenoisingInput, call: Call, branches: Branches, timesteps: Tensor, shape: tuple[int, ...]
    ) -> DenoisingOutput:
        total, condition = x.schedule.num_inference_steps, self._condition(x)
        solver = self._solver_class(self._scheduler, x.schedule)
        start, latents = self._start(x, solver)
        latents = latents.to(self._config.device)
        told = time.monotonic()
        for step in paced_steps(start, total, call, self._config.device):
            given = self._config.model_input(latents, condition)
            output = partial(self._config.model_output, latents=latents)
            prediction, *negative = branches.predict(given, step, output)
            if negative:
                prediction = self._config.guide(prediction, negative[0], x.sampling)
            latents = solver.step(prediction, timesteps[step], latents)
            if self._is_checkpoint(step + 1, total, told):
                told = time.monotonic()
                call.on_checkpoint(self._checkpoint(step + 1, latents, shape, solver))
        if self._caching is not None:
            STEPS_REUSED.inc(branches.reused)
            _log.info("reused the blocks' work of earlier steps %d times in %d steps", branches.reused, total)
        return DenoisingOutput(denoised_latents=self._artifact(latents, shape))

    def _branch(self, keywords: Keywords, timesteps: Tensor, sampling: Sampling) -> Branch:
        batched = timesteps[:, None].expand(-1, sampling.num_outputs_per_prompt)
        prepared = self._transformer.prepare(self._config.model_timestep(batched), **keywords)
        return Branch(self._transformer, prepared, self._graphs, self._caching)

    def _keywords_of_branches(self, x: DenoisingInput, shape: tuple[int, ...]) -> list[Keywords]:
        """The transformer's keywords besides latents and timestep, batched and on the device: positive, then negative.

        The negative branch is there only where the request needs it.
        """
        embeds = merge_conditioning(x.text_conditioning, x.image_conditioning)
        given = None if x.image_latents is None else x.image_latents.parts["condition"].raw_latent_shape
        own = self._config.prepare_pos_cond_kwargs(embeds.prompt_embeds, shape, x.sampling, given)
        positive = self._keywords(embeds.prompt_embeds, own, x.sampling)
        if not embeds.negative_prompt_embeds:
            return [positive]
        own = self._config.prepare_neg_cond_kwargs(embeds.negative_prompt_embeds, shape, x.sampling, given)
        return [positive, self._keywords(embeds.negative_prompt_embeds, own, x.sampling)]

    def _keywords(self, embeds: Mapping[str, Tensor], own: Mapping[str, Tensor | None], sampling: Sampling) -> Keywords:
        device, batch = self._config.device, sampling.num_outputs_per_prompt
        keywords: Keywords = {name: value.to(device).repeat_interleave(batch, 0) for name, value in embeds.items()}
        keywords.update({name: None if value is None else value.to(device) for name, value in own.items()})
        return keywords

    def _start(self, x: DenoisingInput, solver: Solver) -> tuple[int, Tensor]:
        """The step to begin with, and the latents before it."""
        noise = x.initial_latents.parts[self._config.latent_part].latents
        state, total = x.resume_from, x.schedule.num_inference_steps
        if state is None:
            return 0, noise
        if self._caching is not None:
            raise InvalidInput("a loop with a step cache starts at step 0: it has no checkpoints", field="resume_from")
        if not 0 <= state.step <= total:
            raise InvalidInput(f"step {state.step} is not one of 0 to {total}", field="resume_from.step")
        part = state.latents.parts.get(self._config.latent_part)
        if part is None or part.latents.shape != noise.shape:
            raise InvalidInput(
                f"a loop that started at latents {tuple(noise.shape)} cannot continue at others",
                field="resume_from.latents",
            )
        solver.restore(state.step, state.solver)
        return state.step, part.latents

    def _condition(self, x: DenoisingInput) -> Tensor | None:
        """Latents of the request's pictures, batched and on the device."""
        if x.image_latents is None:
            return None
        condition = x.image_latents.parts["condition"].latents.to(self._config.device)
        return condition.repeat_interleave(x.sampling.num_outputs_per_prompt, 0)

    def _is_checkpoint(self, done: int, total: int, told: float) -> bool:
        """Whether to tell one after so many steps, the last one having been told at a time of the monotonic clock."""
        if self._caching is not None:
            return False
        every, seconds = self._config.checkpoint_every, self._config.checkpoint_seconds
        due = 0 < seconds <= time.monotonic() - told
        return (due or (every > 0 and done % every == 0)) and done < total

    def _checkpoint(self, step: int, latents: Tensor, shape: tuple[int, ...], solver: Solver) -> DenoiseState:
        """The loop after so many steps; it is the listener's to keep."""
        kept = on_cpu({**solver.state(), _LATENTS: latents})
        return DenoiseState(step=step, latents=self._artifact(kept.pop(_LATENTS), shape), solver=kept)

    def _artifact(self, latents: Tensor, shape: tuple[int, ...]) -> Latents:
        return Latents(parts={self._config.latent_part: LatentPart(latents=latents.cpu(), raw_latent_shape=shape)})


def _step_caching(config: StandardPipelineConfig) -> StepCaching | None:
    """Ranks that hold parts of one branch decide together; the branches are for themselves."""
    threshold = config.approximation.step_cache_threshold
    if threshold <= 0:
        return None
    axes = () if config.mesh is None else tuple(config.mesh.axis(name) for name in ("tp", "ulysses", "ring"))
    return StepCaching(threshold, axes)


def merge_conditioning(text: Conditioning, image: Conditioning | None) -> Conditioning:
    """What text and image encoders made, as one. The negative branch, if there is one, sees the same pictures.

    Raises InvalidInput for a keyword that both made.
    """
    if image is None:
        return text
    if twice := sorted(text.prompt_embeds.keys() & image.prompt_embeds.keys()):
        raise InvalidInput(f"text and image encoders both made {twice}", field="image_conditioning")
    negative = text.negative_prompt_embeds
    return Conditioning(
        prompt_embeds={**text.prompt_embeds, **image.prompt_embeds},
        negative_prompt_embeds=negative and {**negative, **(image.negative_prompt_embeds or image.prompt_embeds)},
    )
