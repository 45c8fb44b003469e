"""Warm-up requests with synthetic inputs, which a service runs before it accepts requests.

The first request of each size pays for Triton compilation, library initialization and CUDA graph capture; warm-up moves
this cost to start-up. The services that warm up are denoising and, for hybrid models, before_denoising. If texts are
not padded, each number of tokens has its own CUDA graph; warm-up covers one typical number.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from common.artifacts import (
    Canvas,
    Conditioning,
    Generator,
    ImageInputs,
    LatentPart,
    Latents,
    ParamValue,
    Prompt,
    Sampling,
    Schedule,
)
from common.errors import InvalidInput
from common.logs import get_logger
from common.stage import Call
from configs.pipeline_configs.base import DenoisingConfig, NegativePromptConfig, Shapes, Step
from configs.sample.base import SamplingParams
from models.catalog import ServedModel, ServedVariant
from models.media import png_bytes
from models.registry import resolve

STEPS = 3
"""Steps per expert: compile kernels, capture a CUDA graph, replay the graph."""

_LEVELS = 1000
"""Candidate noise levels of a synthetic schedule are the multiples of 1 / _LEVELS between 0 and 1."""
_FIELD = "warm_up"
_DENOISING = "denoising"
_SIZE = re.compile(r"(?P<height>[0-9]{1,5})x(?P<width>[0-9]{1,5})(x(?P<num_frames>[0-9]{1,5}))?")
_VARIANT_SEPARATOR = "@"

_log = get_logger(__name__)


@dataclass(frozen=True)
class WarmUp:
    """Warm-up requests of one model's service: pairs of a variant and the parameters of a request."""

    model: ServedModel
    service: str
    sizes: tuple[tuple[ServedVariant, SamplingParams], ...]

    @classmethod
    def parse(cls, model: ServedModel, texts: Sequence[str], *, service: str = _DENOISING) -> Self:
        """Parse sizes, HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES, with an optional suffix @VARIANT.

        Without a suffix, a size is for all variants. Without FRAMES, the variant's default number of frames is used.
        Raises InvalidInput for malformed sizes, unknown variants, sizes that requests cannot have, and models whose
        PipelineConfig is not a DenoisingConfig.
        """
        return cls(model, service, tuple(each for text in texts for each in _sizes(model, service, text)))

    def run(self, stages: Callable[[Mapping[str, Any], Call], object], dtype: torch.dtype, call: Call) -> None:
        """Run the stages at each size, for a few denoising steps. Raises the errors of the stages.

        `dtype` is the stages' dtype.
        """
        for (variant, params), inputs in zip(self.sizes, self.inputs(dtype), strict=True):
            began = time.monotonic()
            stages(inputs, replace(call, variant=variant.name))
            size = "x".join(str(each) for each in params.extent.values())
            name = f"{size}{_VARIANT_SEPARATOR}{variant.name}" if variant.name else size
            _log.info("warmed up", size=name, seconds=time.monotonic() - began)

    def inputs(self, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
        """Synthetic input artifacts for each size, by slot of the service's stages, on the CPU.

        A service that reads only the request gets the request's artifacts; denoising gets random encoder outputs.
        """
        configs: dict[str, DenoisingConfig] = {}
        for variant, params in self.sizes:
            slots, request = variant.pipeline.service(self.service).contract.inputs, params.artifacts()
            images = {slot: _images(variant, params) for slot, kind in slots.items() if kind == "ImageInputs"}
            if slots.keys() <= request.keys() | images.keys():
                yield {slot: images[slot] if slot in images else request[slot] for slot in slots}
                continue
            if variant.name not in configs:
                config_class: type[DenoisingConfig] = resolve(variant.pipeline_config)
                configs[variant.name] = config_class.from_checkpoint(self.model.checkpoint)
            made = _inputs(configs[variant.name], dtype, request)
            yield {slot: artifact for slot, artifact in made.items() if slot in slots}


def _sizes(model: ServedModel, service: str, text: str) -> Iterator[tuple[ServedVariant, SamplingParams]]:
    size, sign, name = text.partition(_VARIANT_SEPARATOR)
    match = _SIZE.fullmatch(size)
    if match is None:
        message = f"warm_up: {size!r} is not a size; HEIGHTxWIDTH and, for a video, HEIGHTxWIDTHxFRAMES work"
        raise InvalidInput(f"{message}, optionally followed by @VARIANT", field=_FIELD)
    served = [variant for variant, _ in model.variants_of(service)]
    for variant in _chosen(model, text, name) if sign else served:
        if not issubclass(resolve(variant.pipeline_config), DenoisingConfig):
            message = f"warm_up: {text} is not supported by {model.checkpoint.pipeline_name}"
            raise InvalidInput(f"{message}, which has no standard denoising stage", field=_FIELD)
        yield variant, _params(model, variant, text, match)


def _chosen(model: ServedModel, text: str, name: str) -> list[ServedVariant]:
    named = [each for each in model.variants if each.name]
    if chosen := [each for each in named if each.name == name]:
        return chosen
    works = f"its variants are {', '.join(each.name for each in named)}" if named else "write the size without @"
    raise InvalidInput(f"warm_up: {text} does not end with a variant of {model.name}; {works}", field=_FIELD)


def _params(model: ServedModel, variant: ServedVariant, text: str, match: re.Match[str]) -> SamplingParams:
    size = {name: int(value) for name, value in match.groupdict().items() if value is not None}
    request: dict[str, ParamValue] = {"prompt": "", "negative_prompt": "", "num_inference_steps": STEPS, "seed": 0}
    try:
        params, warnings = variant.sampling_params.build({**request, **size}, model.checkpoint)
    except InvalidInput as error:
        raise InvalidInput(f"warm_up: {text}: {error.message}", field=_FIELD) from error
    for warning in warnings:
        if warning.field in size:
            _log.warning("warm_up size is changed", size=text, reason=warning.message)
    return params


def _inputs(
    config: DenoisingConfig, dtype: torch.dtype, request: Mapping[str, Prompt | Canvas | Sampling]
) -> dict[str, Any]:
    prompt, canvas, sampling = request["prompt"], request["canvas"], request["sampling"]
    assert isinstance(prompt, Prompt), "SamplingParams.artifacts() has one artifact per slot"
    assert isinstance(canvas, Canvas), "SamplingParams.artifacts() has one artifact per slot"
    assert isinstance(sampling, Sampling), "SamplingParams.artifacts() has one artifact per slot"
    embeds = {name: _normal(shape, dtype) for name, shape in config.conditioning_shapes().items()}
    ids = config.conditioning_id_shapes(canvas)
    embeds |= {name: torch.zeros(shape, dtype=torch.int64) for name, shape in ids.items()}
    has_negative = isinstance(config, NegativePromptConfig) and config.wants_negative(prompt, sampling)
    inputs: dict[str, Any] = {
        "initial_latents": _latents(config, config.raw_latent_shapes(canvas, sampling.num_outputs_per_prompt), dtype),
        "schedule": _schedule(config, sampling.num_inference_steps),
        "text_conditioning": Conditioning(prompt_embeds=embeds, negative_prompt_embeds=embeds if has_negative else {}),
        "sampling": sampling,
        "latents_generator": Generator(seed=sampling.seed, state=torch.Generator("cpu").get_state()),
    }
    if shapes := config.condition_shapes(canvas):
        inputs["image_latents"] = _latents(config, shapes, dtype)
    return inputs


def _images(variant: ServedVariant, params: SamplingParams) -> ImageInputs:
    """A gray image of the result's size for each required role."""
    data = png_bytes(torch.full((3, params.height, params.width), 0.5))
    file = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return ImageInputs(images=dict.fromkeys(variant.roles.required, file))


def _latents(config: DenoisingConfig, shapes: Shapes, dtype: torch.dtype) -> Latents:
    return Latents(
        parts={
            part: LatentPart(latents=config.pack(part, _normal(shape, dtype)), raw_latent_shape=shape)
            for part, shape in shapes.items()
        }
    )


def _schedule(config: DenoisingConfig, steps: int) -> Schedule:
    """A schedule with `steps` noise levels between 1 and 0 per expert. The levels do not affect the kernels."""
    levels = [(_LEVELS - level) / _LEVELS for level in range(1, _LEVELS)]
    by_expert: dict[str, list[float]] = {}
    for index, (level, below) in enumerate(pairwise([*levels, 0.0])):
        sigma, next_sigma = (dict.fromkeys(config.part_keywords, each) for each in (level, below))
        by_expert.setdefault(config.expert(Step(index, 1000 * level, sigma, next_sigma)), []).append(level)
    chosen = [own[len(own) * step // (steps + 1)] for own in by_expert.values() for step in range(1, steps + 1)]
    sigmas = torch.tensor([*dict.fromkeys(chosen), 0.0])
    return Schedule(timesteps=1000 * sigmas[:-1], sigmas=sigmas, num_inference_steps=len(sigmas) - 1)


def _normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), dtype=dtype)
