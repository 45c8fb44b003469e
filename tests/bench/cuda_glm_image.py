"""All GLM-Image stages on CUDA at 1024x1024, compared with Diffusers in one run.

Weights are random, of published size. Both sides share them in memory, about 36 GB in bfloat16. Diffusers' pipeline
runs first, stage by stage, then the fleet's stages in this process, without RPCs (cuda_flux.py includes RPCs). The
output has times, peak memory without the weights, the fraction of equal prior tokens, and the relative error of latents
computed from Diffusers' tokens; then time and error of one prediction against Diffusers' model in float32. The language
model cannot sample the end of an image, so random weights sample as many tokens as trained weights. No network and no
disk space are needed.

Run it with: python tests/bench/cuda_glm_image.py; to try it without a GPU: --device cpu --scale tiny
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from bench_glm_image import (
    LATENTS_MEAN,
    LATENTS_STD,
    SCALES,
    SCHEDULER,
    Scale,
    build,
    config_of,
    same_weights,
    sizes_of,
)
from bench_meter import CallCount, Meter
from bench_report import median, print_machine, print_table, say
from bench_stages import without_optional_slots
from bench_steps import HIDDEN_STATES
from denoise_step import STEPS, error, float32_prediction, in_turns, peak_beside, step_milliseconds, step_of
from diffusers import FlowMatchEulerDiscreteScheduler, GlmImagePipeline
from torch import Tensor

from common.artifacts import Canvas, Conditioning, Prompt, Sampling
from common.local import HostedStages
from common.stage import Call, PipelineStage
from configs.pipeline_configs.glm_image import GlmImagePipelineConfig
from models.dits.base import DiffusionTransformer
from models.encoder_runners.glyphs import GlyphEncoder
from models.encoder_runners.prior_tokens import PriorTokenSampler
from models.kernels.trials import try_packages
from models.runtime import Runtime
from models.stages.decoding import DecodingStage
from models.stages.denoising import DenoisingStage
from models.stages.latent_preparation import LatentPreparationStage
from models.stages.model_specific_stages.glm_image import GlmImageBeforeDenoisingStage

SEED = 7
PROMPT = 'a red apple on a yellow table, with a sign that says "old stone river"'
GUIDANCE = 1.5
BRANCHES = 2
"""Branches (predictions) per step with guidance."""
WARM_UP_PIXELS = 32
"""Side in pixels of the warm-up image, whose prior tokens are the preview's 256 and one more."""
MOST_ERROR = 0.1
"""Largest relative L2 error between the latents of both sides that rounding can explain."""
REPEATS = 5
"""Number of rounds of five predictions."""
BEFORE, TOKENS, GLYPHS, NOISE = "before_denoising", "prior tokens", "glyph encoder", "noise"
DENOISING, DECODING = "denoising", "decoding"


@dataclass
class Side:
    """Measurements and results of one side. `sampled` is the number of tokens that its language model sampled."""

    meter: Meter
    sampled: int = 0
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    latents: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Setup:
    """Shared inputs of both sides: the modules, our transformer on the same weights, and the sizes.

    `head_calls` counts calls of the language model's head, one per token.
    """

    modules: dict[str, Any]
    config: GlmImagePipelineConfig
    transformer: DiffusionTransformer
    head_calls: CallCount
    device: torch.device
    pixels: int
    steps: int


def main() -> None:
    """Measure and print the tables. Raises RuntimeError if the sides differ by more than rounding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=tuple(SCALES))
    parser.add_argument("--steps", type=int, default=8, help="denoising steps")
    args = parser.parse_args()
    device, scale = torch.device(args.device), SCALES[args.scale]
    try_packages(device)
    print_machine(f"GLM-Image on {args.device}, against Diffusers in the same run")
    if device.type == "cuda":
        say(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
        say()
    setup = set_up(scale, device, args.steps)
    theirs = run_diffusers(setup)
    say("Diffusers finished")
    ours, slots = run_stages(setup, theirs.tokens)
    say("The fleet's stages finished")
    say()
    say(f"## bfloat16, {scale.pixels}x{scale.pixels}, {args.steps} steps, guidance {GUIDANCE} ({BRANCHES} branches)")
    say()
    print_stages(ours, theirs, args.steps)
    print_differences(ours, theirs)
    print_predictions(setup, prediction_inputs(setup, slots))


def print_stages(ours: Side, theirs: Side, steps: int) -> None:
    """Print the tables of times and, if measured, of memory."""
    mine, other = ours.meter.spent, theirs.meter.spent
    lines = [
        (BEFORE, mine[BEFORE], other[BEFORE]),
        (f"- prior tokens ({ours.sampled}; Diffusers {theirs.sampled})", mine[TOKENS], other[TOKENS]),
        ("- prior tokens, ms per token", mine[TOKENS] / ours.sampled, other[TOKENS] / theirs.sampled),
        (f"- glyph encoder ({BRANCHES} branches)", mine[GLYPHS], other[GLYPHS]),
        ("- noise", mine[NOISE], other[NOISE]),
        (f"denoising ({steps} steps of {BRANCHES} branches)", mine[DENOISING], other[DENOISING]),
        ("- ms per step", mine[DENOISING] / steps, other[DENOISING] / steps),
        (DECODING, mine[DECODING], other[DECODING]),
    ]
    rows = [(name, first, second, f"{first / second:.2f}") for name, first, second in lines]
    print_table(("ms", "fleet's stages", "Diffusers", "ratio"), rows)
    peaks = [
        (name, ours.meter.peaks[name] / 1e9, theirs.meter.peaks[name] / 1e9)
        for name in (BEFORE, TOKENS, GLYPHS, DENOISING, DECODING)
        if name in ours.meter.peaks
    ]
    if peaks:
        print_table(("GB without weights", "fleet's stages", "Diffusers"), peaks)


def print_differences(ours: Side, theirs: Side) -> None:
    """Print the differences of prior tokens and latents. Raises RuntimeError if the latents exceed MOST_ERROR."""
    equal = float((ours.tokens == theirs.tokens).double().mean())
    difference = error(ours.latents, theirs.latents.double())
    say(f"Prior tokens: {100 * equal:.1f}% equal")
    say(f"Latents from Diffusers' tokens: relative L2 error {difference:.2e}")
    say()
    if not (difference <= MOST_ERROR and bool(ours.latents.isfinite().all())):
        raise RuntimeError(f"latents: a relative L2 error of {difference:.2e} is not at most {MOST_ERROR}")


@torch.inference_mode()
def print_predictions(setup: Setup, inputs: dict[str, Any]) -> None:
    """Print time, error and memory of one prediction; the sides alternate on a warm GPU."""
    theirs, device = setup.modules["transformer"], setup.device
    exact = float32_prediction(theirs, inputs)
    given = dict(inputs)
    hidden_states, timestep = given.pop("hidden_states"), given.pop("timestep")
    ours = step_of(setup.transformer, {HIDDEN_STATES: hidden_states}, timestep[None].expand(STEPS, -1), given)
    sides: dict[str, Callable[[], Tensor]] = {
        "Diffusers": lambda: theirs(**inputs, return_dict=False)[0],
        "ours": lambda: ours()[HIDDEN_STATES],
    }
    errors = {name: error(run(), exact) for name, run in sides.items()}
    peaks = {name: peak_beside(run, device) for name, run in sides.items()}
    spent = in_turns(sides, partial(step_milliseconds, device=device), REPEATS)
    print_table(
        ("one prediction", "ms", "fastest", "error against float32", "MB without weights"),
        [(name, median(spent[name]), min(spent[name]), f"{errors[name]:.2e}", peaks[name]) for name in spent],
    )
    say(f"Ours takes {median(spent['ours']) / median(spent['Diffusers']):.2f} times as long as Diffusers")


def prediction_inputs(setup: Setup, slots: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of one prediction with prior tokens, by the argument names of Diffusers' forward()."""
    embeds = {name: each.to(setup.device) for name, each in slots["text_conditioning"].prompt_embeds.items()}
    noise = slots["initial_latents"].parts["image"]
    keywords = setup.config.prepare_pos_cond_kwargs(embeds, {"image": noise.raw_latent_shape}, slots["sampling"])
    return {
        "hidden_states": noise.latents.to(setup.device, torch.bfloat16),
        "timestep": torch.tensor([749.0], device=setup.device),
        **embeds,
        **{name: each.to(setup.device) for name, each in keywords.items() if each is not None},
    }


def set_up(scale: Scale, device: torch.device, steps: int) -> Setup:
    """Draw the weights and print their number."""
    modules = build(scale, device)
    config = config_of(modules)
    say(f"Parameters: {sizes_of(modules)}")
    return Setup(
        modules=modules,
        config=config,
        transformer=same_weights(config, modules["transformer"]),
        head_calls=CallCount(modules["vision_language_encoder"].lm_head),
        device=device,
        pixels=scale.pixels,
        steps=steps,
    )


def check_sampled(side: str, sampled: int, expected: int) -> int:
    """Return the number of sampled tokens. Raises RuntimeError if it differs from `expected`."""
    if sampled != expected:
        raise RuntimeError(
            f"{side}: {sampled} sampled tokens are not {expected}; the language model must not end early"
        )
    return sampled


def tokens_of(pixels: int) -> int:
    """Image tokens of a square image, including its preview."""
    return (pixels // 32) ** 2 + 256


@torch.inference_mode()
def run_diffusers(setup: Setup) -> Side:
    """Run Diffusers' pipeline for warm-up, then timed. It samples one more token than it uses."""
    pipeline = GlmImagePipeline(**setup.modules)
    pipeline.set_progress_bar_config(disable=True)
    side = Side(Meter(setup.device))
    watched = {"generate_prior_tokens": TOKENS, "encode_prompt": GLYPHS, "prepare_latents": NOISE}
    with side.meter.watching({(GlmImagePipeline, method): name for method, name in watched.items()}):
        for pixels in (WARM_UP_PIXELS, setup.pixels):
            side.meter.clear()
            side.tokens = prepare(pipeline, pixels, setup.device, side.meter)
            side.sampled = check_sampled("Diffusers", setup.head_calls.take(), tokens_of(pixels) + 1)
        measured = dict(side.meter.spent)
        side.meter.rebase()
        for _ in range(2):
            side.meter.clear()
            side.latents = denoise(pipeline, side.tokens, setup, side.meter)
        loop = side.meter.spent
        measured[DENOISING] = loop[DENOISING] - loop[GLYPHS] - loop[NOISE]
        side.meter.rebase()
        for _ in range(2):
            side.meter.clear()
            decode(pipeline, side.latents, side.meter)
    side.meter.spent |= measured
    side.tokens, side.latents = side.tokens.cpu(), side.latents.cpu()
    return side


def prepare(pipeline: Any, pixels: int, device: torch.device, meter: Meter) -> Tensor:
    """Run Diffusers' work before the loop; returns the prior tokens."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    with meter.part(BEFORE):
        tokens: Tensor = pipeline.generate_prior_tokens(PROMPT, pixels, pixels, device=device, generator=generator)[0]
        embeds, _ = pipeline.encode_prompt(PROMPT, device=device)
        channels = pipeline.transformer.config.in_channels
        pipeline.prepare_latents(1, channels, pixels, pixels, embeds.dtype, device, generator)
    return tokens


def denoise(pipeline: Any, tokens: Tensor, setup: Setup, meter: Meter) -> Tensor:
    """Run Diffusers' loop; glyph encoding and noise are measured as separate parts."""
    with meter.part(DENOISING):
        latents: Tensor = pipeline(
            PROMPT,
            prior_token_ids=tokens,
            height=setup.pixels,
            width=setup.pixels,
            num_inference_steps=setup.steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(SEED),
            output_type="latent",
        ).images
    return latents


def decode(pipeline: Any, latents: Tensor, meter: Meter) -> None:
    """Run Diffusers' decoding to pixels on the CPU."""
    with meter.part(DECODING):
        given = latents.to(pipeline.vae.dtype)
        mean, std = (torch.tensor(each).view(1, -1, 1, 1).to(given) for each in (LATENTS_MEAN, LATENTS_STD))
        decoded = pipeline.vae.decode(given * std + mean, return_dict=False)[0]
        pipeline.image_processor.postprocess(decoded, output_type="pt").float().cpu()


def run_stages(setup: Setup, tokens: Tensor) -> tuple[Side, dict[str, Any]]:
    """Run the fleet's stages for warm-up, then timed; also returns the artifacts by slot.

    The loop uses the given prior tokens, so that its latents are comparable.
    """
    canvas = Canvas(height=setup.pixels, width=setup.pixels, output_format="safetensors")
    slots: dict[str, Any] = {
        "prompt": Prompt(prompt=PROMPT),
        "canvas": canvas,
        "sampling": Sampling(num_inference_steps=setup.steps, seed=SEED, guidance_scale=GUIDANCE),
    }
    side, measured = Side(Meter(setup.device)), dict[str, float]()
    watched = {(PriorTokenSampler, "sample"): TOKENS, (GlyphEncoder, "encode"): GLYPHS}
    with side.meter.watching(watched | {(LatentPreparationStage, "run"): NOISE}):
        for service, stage in stages_of(setup).items():
            side.meter.rebase()
            warm_up = replace(canvas, height=WARM_UP_PIXELS, width=WARM_UP_PIXELS) if service == BEFORE else canvas
            for size in (warm_up, canvas):
                side.meter.clear()
                setup.head_calls.take()
                outputs = run_stage(service, stage, slots | {"canvas": size}, side.meter)
            measured |= side.meter.spent
            slots |= outputs
            if service == BEFORE:
                side.sampled = check_sampled("the fleet", setup.head_calls.take(), tokens_of(setup.pixels))
                side.tokens = slots["text_conditioning"].prompt_embeds["prior_token_id"]
                slots["text_conditioning"] = with_tokens(slots["text_conditioning"], tokens)
    side.meter.spent = measured
    side.latents = slots["denoised_latents"].parts["image"].latents
    return side, slots


def stages_of(setup: Setup) -> dict[str, PipelineStage[Any, Any]]:
    """Build the fleet's stages by service."""
    runtime = Runtime(device=setup.device, dtype=torch.bfloat16)
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    given = {**setup.modules, "transformer": setup.transformer, "scheduler": scheduler}
    stages: dict[str, PipelineStage[Any, Any]] = {
        BEFORE: GlmImageBeforeDenoisingStage(setup.config, runtime, given),
        DENOISING: DenoisingStage(setup.config, runtime, given),
        DECODING: DecodingStage(setup.config, runtime, given),
    }
    # GLM-Image reads no optional slot between its stages.
    return {service: stage.bind(without_optional_slots(stage.contract)) for service, stage in stages.items()}


def run_stage(service: str, stage: PipelineStage[Any, Any], slots: Mapping[str, Any], meter: Meter) -> dict[str, Any]:
    """Run a stage on its input slots; measured as a part with its service's name."""
    hosted = HostedStages(service, [stage])
    inputs = {name: slots[name] for name in hosted.contract.inputs if name in slots}
    with meter.part(service):
        return hosted.run(inputs, Call("bench"))


def with_tokens(conditioning: Conditioning, tokens: Tensor) -> Conditioning:
    """Replace the prior tokens in the conditioning."""
    prior = {"prior_token_id": tokens}
    return replace(
        conditioning,
        prompt_embeds={**conditioning.prompt_embeds, **prior},
        negative_prompt_embeds={**conditioning.negative_prompt_embeds, **prior},
    )


if __name__ == "__main__":
    main()
