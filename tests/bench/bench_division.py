"""Hooks that divide a call of a Diffusers pipeline into the fleet's stages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from bench_sides import StageMeter
from torch import Tensor

TEXT, IMAGES, PREPARATION = "text_encoding", "image_encoding", "latent_preparation"
BEFORE, DENOISING, DECODING = "before_denoising", "denoising", "decoding"
PREPARED_DENOISING = "latent_preparation and denoising"
PIXELS_ALONE = "decoding, pixels on the device"


def shared_stages(services: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Stages that are measured on both sides; each maps to its services.

    Diffusers prepares latents and timesteps between other work: preparation counts as denoising, unless the model has
    one service for all work before denoising.
    """
    if PREPARATION not in services:
        return {name: (name,) for name in services}
    alone = (name for name in services if name not in (PREPARATION, DENOISING, DECODING))
    return {
        **{name: (name,) for name in alone},
        PREPARED_DENOISING: (PREPARATION, DENOISING),
        DECODING: (DECODING,),
    }


@contextmanager
def dividing(
    pipeline: Any, meter: StageMeter, services: Collection[str], steps: int, take: Callable[[Tensor], None]
) -> Iterator[None]:
    """Mark the ends of the stages in one call, up to the pixels on the device.

    Text encoding ends with encode_prompt(), which may run once per branch. Image encoding includes resizing for the
    VAE. A stage for all work before denoising ends at the first prediction. `take` receives the latents of the last
    step.
    """
    denoising = DENOISING if BEFORE in services else PREPARED_DENOISING
    step, decode = pipeline.scheduler.step, pipeline.vae.decode
    taken: list[int] = []

    def take_step(*given: Any, **keywords: Any) -> Any:
        made = step(*given, **keywords)
        taken.append(len(taken))
        if len(taken) == steps:
            meter.end(denoising)
            take(made[0] if isinstance(made, tuple) else made.prev_sample)
        return made

    with ExitStack() as stack:
        stack.enter_context(patch.object(pipeline.scheduler, "step", take_step))
        stack.enter_context(patch.object(pipeline.vae, "decode", _ending(decode, meter, PIXELS_ALONE)))
        if BEFORE in services:
            stack.enter_context(_ending_before(pipeline.transformer, meter))
        else:
            encode_prompt = _ending(pipeline.encode_prompt, meter, TEXT)
            stack.enter_context(patch.object(pipeline, "encode_prompt", encode_prompt))
        if IMAGES in services:
            resize = _ending(pipeline.image_processor.preprocess, meter, IMAGES, before=TEXT)
            stack.enter_context(patch.object(pipeline.image_processor, "preprocess", resize))
            stack.enter_context(patch.object(pipeline.vae, "encode", _ending(pipeline.vae.encode, meter, IMAGES)))
        yield


def _ending(run: Callable[..., Any], meter: StageMeter, stage: str, *, before: str = "") -> Callable[..., Any]:
    """Wrap a function so that its return ends a stage, and its call ends the stage `before`."""

    def ended(*given: Any, **keywords: Any) -> Any:
        if before:
            meter.end(before)
        made = run(*given, **keywords)
        meter.end(stage)
        return made

    return ended


@contextmanager
def _ending_before(transformer: Any, meter: StageMeter) -> Iterator[None]:
    """End the stage BEFORE at the first prediction."""

    def end(*_: object) -> None:
        meter.end(BEFORE)
        first.remove()

    first = transformer.register_forward_pre_hook(end)
    try:
        yield
    finally:
        first.remove()
