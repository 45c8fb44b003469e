"""All stages of a model family on CUDA, compared with Diffusers in one run.

Weights are random, of published size; both sides share them in memory. Diffusers' pipeline runs first: hooks divide its
call into stages; its denoising includes the preparation of latents and timesteps, for which the fleet has a separate
stage. Then the fleet loads its stages from these modules and runs them in this process, without RPCs (cuda_flux.py
includes RPCs). Input images are noise: Diffusers takes them decoded, the fleet's stages decode PNG files. Each side
runs once for warm-up and once timed. The output has times, peak memory without the weights, and the relative error of
the latents. No network is needed; only a small checkpoint is written, to a temporary folder.

Run it with: python tests/bench/cuda_stages.py --family z-image; to try it without a GPU: --device cpu --scale tiny.
With --swap-experts, the fleet has one of two denoisers on the GPU at a time. With --float32, Diffusers also runs in
float32 and the errors of both sides against it are printed; weights then take twice the memory.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_device import empty, now
from bench_division import DECODING, PIXELS_ALONE, dividing, shared_stages
from bench_families import DTYPE, FAMILIES, Family
from bench_float32 import float32_bytes, in_float32
from bench_image import png, random_image
from bench_memory_checkpoint import Modules, weights_in_memory, write_configs
from bench_report import print_machine, print_table, say
from bench_sides import Side, StageMeter, latents_error, print_sides
from PIL import Image
from torch import Tensor, nn

from common.artifacts import LatentPart, Sampling
from common.local import HostedStages
from common.stage import Call
from configs.pipeline_configs.base import DecodingConfig
from models.catalog import ServedModel, open_model
from models.kernels.trials import try_packages
from models.loader import load_module, load_stages
from models.registry import load_registry, resolve
from models.runtime import Runtime
from models.validation import InputValidationStage, ValidatedRequest
from tiny_flux import WORDS

PROMPT = " ".join(WORDS * 16)
SEED = 7
IMAGE_SIDE = 1024
"""Side of input images in pixels."""
COPIES = "decoding, copies to the host"
WHOLE = "all stages"
_COUNTED = {"num_frames": "frames", "layers": "layers"}


@dataclass(frozen=True)
class Case:
    """A family's modules in memory, the model with their configs, and the request for both sides.

    Modules that the fleet replaces are removed from `modules` when they are loaded. `validated` is the request after
    validation, for the fleet's stages.
    """

    family: Family
    model: ServedModel
    modules: Modules
    request: Mapping[str, Any]
    images: Sequence[Image.Image]
    validated: ValidatedRequest
    runtime: Runtime

    @property
    def device(self) -> torch.device:
        """Device of both sides."""
        return self.runtime.device

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return int(self.request["num_inference_steps"])

    @property
    def services(self) -> list[str]:
        """The fleet's services in order."""
        return [spec.service for spec in self.validated.variant.services]

    @property
    def stages(self) -> dict[str, tuple[str, ...]]:
        """Stages that are measured on both sides, each with its services."""
        return shared_stages(self.services)

    @property
    def title(self) -> str:
        """Size, steps and dtype."""
        params = self.validated.params
        parts = [str(DTYPE), f"{params.height}x{params.width}"]
        parts += [f"{self.request[name]} {what}" for name, what in _COUNTED.items() if name in self.request]
        parts += [f"input images: {len(self.images)}"] * bool(self.images) + [f"{self.steps} steps"]
        return ", ".join(parts + ["experts swapped"] * self.runtime.swap_experts)


def main() -> None:
    """Measure one family and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", required=True, choices=tuple(FAMILIES))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=("full", "tiny"))
    parser.add_argument("--steps", type=int, default=8, help="denoising steps")
    parser.add_argument("--swap-experts", action="store_true", help="hold one expert of wan-a14b on the GPU at a time")
    parser.add_argument("--float32", action="store_true", help="also print errors against Diffusers in float32")
    args = parser.parse_args()
    device, family = torch.device(args.device), FAMILIES[args.family]
    if args.swap_experts and args.family != "wan-a14b":
        parser.error(f"--swap-experts: {args.family} is not a family with two experts; wan-a14b works")
    try_packages(device)
    is_tiny = args.scale == "tiny"
    print_machine(f"{'Small: ' if is_tiny else ''}{family.title} on {args.device}, against Diffusers in the same run")
    if device.type == "cuda":
        say(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
        say()
    with tempfile.TemporaryDirectory() as folder:
        directory = family.build_tiny(Path(folder))
        pipeline = pipeline_of(family, directory, device, is_tiny=is_tiny)
        modules = {name: each for name, each in pipeline.components.items() if isinstance(each, nn.Module)}
        write_configs(directory, modules)
        request = {**family.request, **(family.small if is_tiny else {}), "num_inference_steps": args.steps}
        runtime = Runtime(device=device, dtype=DTYPE, swap_experts=args.swap_experts)
        case = case_of(family, open_model(str(directory), load_registry()), modules, request, runtime)
        theirs = run_diffusers(pipeline, case)
        exact = run_in_float32(pipeline, case) if args.float32 else None
        del pipeline
        empty(device)
        with weights_in_memory(case.modules):
            ours = run_stages(case)
    print_case(case, ours, theirs)
    if exact is not None:
        part = family.part
        errors = f"fleet {latents_error(ours, exact, part):.2e}, Diffusers {latents_error(theirs, exact, part):.2e}"
        say(f"Latents against Diffusers in float32: {errors}")


def case_of(family: Family, model: ServedModel, modules: Modules, request: Mapping[str, Any], runtime: Runtime) -> Case:
    """Build the request with random images, before and after validation."""
    images = [random_image(IMAGE_SIDE, mode, index) for index, mode in enumerate(family.image_modes)]
    files = {f"image_{index}" if index else "image": png(each) for index, each in enumerate(images)}
    given = {"prompt": PROMPT, "seed": SEED, "output_format": "safetensors", **request}
    validated = InputValidationStage(model).run(given, files)
    return Case(family, model, modules, request, images, validated, runtime)


def pipeline_of(family: Family, directory: Path, device: torch.device, *, is_tiny: bool) -> Any:
    """Build Diffusers' pipeline on the device, with the small checkpoint's tokenizers and schedulers.

    Print the sizes of its modules.
    """
    began = now(device)
    pipeline: Any = family.open_small(directory).to(device)
    if not is_tiny:
        modules = family.published_modules(device)
        pipeline = family.pipeline(**{**pipeline.components, **modules}, **family.index)
    networks = {name: each for name, each in pipeline.components.items() if isinstance(each, nn.Module)}
    for each in networks.values():
        each.requires_grad_(False).eval()
    counts = {name: sum(value.numel() for value in each.parameters()) / 1e9 for name, each in networks.items()}
    print_table(("module", "1e9 parameters"), counts.items())
    say(f"{sum(counts.values()):.1f}e9 random parameters, drawn in {now(device) - began:.1f} s")
    print_memory("Weights", device)
    say()
    return pipeline


def print_memory(what: str, device: torch.device) -> None:
    """Print the allocated GPU memory."""
    if device.type == "cuda":
        say(f"{what}: {torch.cuda.memory_allocated(device) / 1e9:.1f} GB on the GPU")


def print_case(case: Case, ours: Side, theirs: Side) -> None:
    """Print the stages of both sides and the error of the latents."""
    say()
    say(f"## {case.title}")
    say()
    print_sides(ours, theirs)
    say(f"Latents: relative L2 error {latents_error(ours, theirs, case.family.part):.2e}")


@torch.inference_mode()
def run_diffusers(pipeline: Any, case: Case) -> Side:
    """Run the reference for warm-up, then timed."""
    pipeline.set_progress_bar_config(disable=True)
    side = Side()

    def take(latents: Tensor) -> None:
        side.latents[case.family.part] = latents.cpu()

    for _ in range(2):
        meter = StageMeter(case.device, side)
        with dividing(pipeline, meter, case.services, case.steps, take):
            (made,) = pipeline(**call_of(case), output_type="pt", return_dict=False)
        # One tensor, or a list with one tensor of layers per output.
        for each in made:
            each.float().cpu()
        meter.end(COPIES)
        del made, each
    side.join(DECODING, (PIXELS_ALONE, COPIES))
    side.join(WHOLE, tuple(case.stages))
    return side


def call_of(case: Case) -> dict[str, Any]:
    """Keyword arguments of one reference call."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    match case.images:
        case []:
            images: dict[str, Any] = {}
        case [image]:
            images = {"image": image}
        case several:
            images = {"image": list(several)}
    return {"prompt": PROMPT, "generator": generator, **images, **case.request}


class LastStepTaken(Exception):
    """Ends a reference call after its last step, because some pipelines cannot return latents."""


def run_in_float32(pipeline: Any, case: Case) -> Side:
    """Run the reference with the same weights in float32; returns its latents.

    Raises RuntimeError if the GPU memory is too small.
    """
    # A VAE that encodes input images is a part of the reference.
    networks = [each for name, each in case.modules.items() if name != "vae" or case.images]
    if case.device.type == "cuda":
        needed, total = float32_bytes(networks), torch.cuda.get_device_properties(case.device).total_memory
        if needed > 0.9 * total:
            sizes = f"weights of {needed / 1e9:.0f} GB are not below 90% of {total / 1e9:.0f} GB"
            raise RuntimeError(f"--float32: {sizes}; run this family without --float32")
    side = Side()

    def take(latents: Tensor) -> None:
        side.latents[case.family.part] = latents.cpu()
        raise LastStepTaken

    meter = StageMeter(case.device, Side())
    with in_float32(networks), suppress(LastStepTaken), dividing(pipeline, meter, case.services, case.steps, take):
        pipeline(**call_of(case))
    return side


def run_stages(case: Case) -> Side:
    """Run the fleet's services in order, each for warm-up and then timed."""
    model, validated = case.model, case.validated
    slots: dict[str, Any] = dict(validated.artifacts)
    side = Side()
    for spec in validated.variant.services:
        stages = HostedStages(spec.service, load_stages(model, spec, case.runtime, variant=validated.variant.name))
        empty(case.device)
        print_memory(f"Weights while the fleet runs {spec.service}", case.device)
        inputs = {slot: slots[slot] for slot in stages.contract.inputs if slot in slots}
        for _ in range(2):
            meter = StageMeter(case.device, side)
            outputs = stages.run(inputs, Call("bench"))
            meter.end(spec.service)
        slots |= outputs
        del stages, outputs
        empty(case.device)
    part = slots["denoised_latents"].parts[case.family.part]
    config = resolve(validated.variant.pipeline_config).from_checkpoint(model.checkpoint)
    decode_alone(model, config, part, slots["sampling"], case, side)
    side.latents = {case.family.part: part.latents}
    for stage, services in case.stages.items():
        side.join(stage, services)
    side.join(WHOLE, tuple(case.stages))
    return side


@torch.inference_mode()
def decode_alone(
    model: ServedModel, config: DecodingConfig, part: LatentPart, sampling: Sampling, case: Case, side: Side
) -> None:
    """Measure only the VAE: pixels on the device, without a file."""
    vae = load_module(model.checkpoint, "vae", config, case.runtime)
    raw = config.unpack(case.family.part, part.latents.to(case.device), part.raw_latent_shape)
    given = config.vae_latents(raw.to(DTYPE))
    how = config.decoding_noise(sampling)
    noise = {} if how is None else {"noise": torch.randn_like(given), **vars(how)}
    meter = StageMeter(case.device, side)
    for _ in range(2):
        meter.restart()
        if case.family.part == "video":
            made = list(vae.session(*given.shape[2:], **noise).feed(given))
        else:
            made = vae.decode(given, return_dict=False)
        meter.end(PIXELS_ALONE)
        del made


if __name__ == "__main__":
    main()
