"""Guided predictions of a denoising loop: what a request prepares once, and what its denoisers predict at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from common.artifacts import Conditioning
from common.errors import InvalidInput
from configs.pipeline_configs.base import NEGATIVE, DenoisingConfig, Keywords, Parts, Shapes, Step
from models.contracts import DenoisingInput
from models.experts import on_device
from models.runtime import Runtime
from models.stages.branches import Branch, Branches, StepCaching, lease_branch
from models.stages.step_memory import NO_FLAGS, Flags, Lease


@dataclass(frozen=True)
class LoopRequest:
    """A request as a loop reads it: `conditions` on the device with a row for each output, `embeds` as received."""

    x: DenoisingInput
    embeds: Conditioning
    conditions: Parts
    shapes: Shapes
    steps: tuple[Step, ...]
    branches: tuple[str, ...]


class Predictor:
    """The denoisers of one model, by role. All denoising loops prepare their requests and predict through it."""

    def __init__(self, config: DenoisingConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._runtime = runtime
        self.transformers = {role: modules[role] for role in config.transformers}
        self.dtype = config.prediction_dtype or runtime.dtype

    def request(self, x: DenoisingInput) -> LoopRequest:
        """The request of an input. Raises InvalidInput for a keyword that both encoders made."""
        embeds = merge_conditioning(x.text_conditioning, x.image_conditioning)
        given = x.image_latents.parts if x.image_latents else {}
        parts = {**x.initial_latents.parts, **given}
        return LoopRequest(
            x=x,
            embeds=embeds,
            conditions={part: self._batched(each.latents, x) for part, each in given.items()},
            shapes={part: each.raw_latent_shape for part, each in parts.items()},
            steps=steps_of(x, self._config.part_keywords),
            branches=self._config.branches_of(x.sampling, has_negative=bool(embeds.negative_prompt_embeds)),
        )

    def branches(
        self,
        request: LoopRequest,
        latents: Parts,
        steps: Sequence[Step],
        lease: Lease,
        caching: StepCaching | None = None,
    ) -> Branches:
        """The branches of the request on the denoisers that `steps` need.

        `latents` have the shapes of those that predict() will get. The denoiser that is needed last is prepared first:
        where denoisers are swapped, an earlier request left it on the device.
        """
        roles = tuple(dict.fromkeys(self._config.expert(step) for step in reversed(steps)))
        given = self.model_input(latents, request.conditions)
        make = partial(self._branch, request, given, lease, caching)
        return Branches(request.branches, roles, make, self._runtime.axis("cfg"), self.dtype)

    def predict(
        self, request: LoopRequest, branches: Branches, latents: Parts, step: Step, flags: Flags = NO_FLAGS
    ) -> Parts:
        """The guided predictions of a step, by part. `flags` are static keywords of the step's prediction."""
        config = self._config
        given = self.model_input(latents, request.conditions)
        predict = partial(self._predict, given, latents, step, flags)
        active, role = config.active(step, request.branches, request.x.sampling), config.expert(step)
        on_device(self.transformers[role])
        predicted = branches.predict(active, role, predict, latents)
        if len(predicted) == 1:
            return predicted[active[0]]
        return config.guide(predicted, latents, step, request.x.sampling)

    def model_input(self, latents: Parts, conditions: Parts) -> dict[str, Tensor]:
        """The denoiser's latents by its keywords, in the weights' dtype."""
        given = self._config.model_input(latents, conditions)
        keywords = {**self._config.part_keywords, **self._config.condition_keywords}
        return {keywords[part]: each.to(self._runtime.dtype) for part, each in given.items()}

    def _predict(self, given: Mapping[str, Tensor], latents: Parts, step: Step, flags: Flags, branch: Branch) -> Parts:
        """One branch's predictions for the loop's latents, by part."""
        predictions = branch.predict(given, step.index, flags)
        keywords = self._config.part_keywords
        by_part = {part: predictions[keyword].to(self.dtype) for part, keyword in keywords.items()}
        return self._config.model_output(by_part, latents)

    def _branch(
        self,
        request: LoopRequest,
        latents: Mapping[str, Tensor],
        lease: Lease,
        caching: StepCaching | None,
        name: str,
        role: str,
    ) -> Branch:
        x, transformer = request.x, on_device(self.transformers[role])
        timesteps = self._config.prepared_timesteps(x.schedule.timesteps).to(self._runtime.device)
        batched = timesteps[:, None].expand(-1, x.sampling.num_outputs_per_prompt)
        keywords = self._keywords(request, name)
        prepared = transformer.prepare(self._config.model_timestep(batched), **keywords)
        flags = self._config.branch_flags(name, x.sampling)
        return lease_branch(lease, role, transformer, prepared, latents, flags=flags, caching=caching)

    def _keywords(self, request: LoopRequest, branch: str) -> Keywords:
        """The denoiser's keywords besides latents and timestep, batched and on the device."""
        config, embeds, sampling = self._config, request.embeds, request.x.sampling
        if branch == NEGATIVE:
            given = embeds.negative_prompt_embeds
            own = config.prepare_neg_cond_kwargs(given, request.shapes, sampling)
        else:
            given = embeds.prompt_embeds
            own = config.prepare_pos_cond_kwargs(given, request.shapes, sampling)
        batched = {name: self._batched(value, request.x) for name, value in given.items()}
        return {**batched, **{name: None if value is None else self._on_device(value) for name, value in own.items()}}

    def _batched(self, value: Tensor, x: DenoisingInput) -> Tensor:
        """A row for each output, on the device."""
        return self._on_device(value).repeat_interleave(x.sampling.num_outputs_per_prompt, 0)

    def _on_device(self, value: Tensor) -> Tensor:
        return value.to(self._runtime.device)


def steps_of(x: DenoisingInput, parts: Mapping[str, str]) -> tuple[Step, ...]:
    """The steps of a schedule; all parts have its noise levels."""
    timesteps, sigmas = x.schedule.timesteps.tolist(), x.schedule.sigmas.tolist()
    levels = [dict.fromkeys(parts, sigma) for sigma in sigmas]
    return tuple(
        Step(index, float(timesteps[index]), levels[index], levels[index + 1])
        for index in range(x.schedule.num_inference_steps)
    )


def merge_conditioning(text: Conditioning, image: Conditioning | None) -> Conditioning:
    """The conditioning of text and image encoders together. The negative branch, if there is one, has the same images.

    Raises InvalidInput for a keyword that both encoders made.
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
