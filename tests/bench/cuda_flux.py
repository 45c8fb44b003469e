"""All Flux stages on CUDA in a fleet of processes, compared with Diffusers in one run.

The models are the emoji model and full-size FLUX.1 with random weights. Diffusers runs first and is timed per stage,
with a device synchronization before and after each stage. After it has released the GPU, the fleet starts as separate
processes and runs the same directory, prompt and seed. The output has stage times, the relative error of the latents,
and the error of the pixels. No network is needed: the full checkpoint (34 GB) is generated on the GPU, written to
--directory and removed at the end. GPU memory: at most about 40 GB.

Run it with: python tests/bench/cuda_flux.py; to try it without a GPU: --device cpu --scale tiny
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_checkpoint import SCALES, build_checkpoint, remove_checkpoint
from bench_device import empty, now
from bench_fleet import Caller, Timeline, running_fleet
from bench_report import median, print_machine, print_table, say
from diffusers import FluxPipeline
from safetensors.torch import load
from torch import Tensor

from fleet.v1 import generation_pb2 as api
from models.catalog import open_model
from models.kernels.trials import try_packages
from models.registry import load_registry

PROMPT = "a red apple on a yellow background next to a blue house"
SEED = 7
GUIDANCE = 3.5
STAGES = ("text encoding", "denoising", "a step", "decoding", "whole request")


@dataclass(frozen=True)
class Case:
    """One model in one dtype, and the size of its request."""

    name: str
    directory: Path
    dtype: torch.dtype
    pixels: int
    steps: int
    text_tokens: int

    @property
    def dtype_name(self) -> str:
        """Name of the dtype on the command line."""
        return str(self.dtype).removeprefix("torch.")


@dataclass
class SideResult:
    """Results of one side, and times in ms by stage, one entry per repeat."""

    latents: Tensor
    pixels: Tensor
    spent: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})


def main() -> None:
    """Measure all cases and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=tuple(SCALES))
    parser.add_argument("--steps", type=int, default=28, help="steps of the full-size model")
    parser.add_argument("--repeats", type=int, default=3, help="timed requests per side")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()) / "flux-random",
        help="temporary folder of the random FLUX.1 checkpoint",
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    try_packages(device)
    os.environ["FLEET_DEVICE"] = args.device
    print_machine(f"Flux on {args.device}, against Diffusers in the same run")
    if device.type == "cuda":
        say(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
        say()
    emoji = open_model("emoji", load_registry()).checkpoint.path
    exact = measure(Case("emoji", emoji, torch.float32, 128, 20, 64), device, args.repeats)
    measure(Case("emoji", emoji, torch.bfloat16, 128, 20, 64), device, args.repeats, exact)
    scale = SCALES[args.scale]
    try:
        began = time.perf_counter()
        build_checkpoint(args.directory, scale, emoji, device=device, dtype=torch.bfloat16)
        empty(device)
        say(f"Random FLUX.1, {args.scale} size, written in {time.perf_counter() - began:.0f} s")
        say()
        name = f"FLUX.1 random ({args.scale})"
        case = Case(name, args.directory, torch.bfloat16, scale.pixels, args.steps, scale.text_tokens)
        measure(case, device, args.repeats)
    finally:
        remove_checkpoint(args.directory)


def measure(case: Case, device: torch.device, repeats: int, exact: Tensor | None = None) -> Tensor:
    """Run both sides, print times and errors, and return Diffusers' latents.

    `exact` are the latents of Diffusers in float32.
    """
    began = time.perf_counter()
    theirs = draw_with_diffusers(case, device, repeats)
    empty(device)
    loaded = time.perf_counter()
    with running_fleet("--model", f"model={case.directory}", "--dtype", case.dtype_name) as fleet:
        ready = fleet.ready_seconds
        ours = draw_with_fleet(case, fleet.endpoint, repeats)
    say(f"## {case.name}, {case.dtype_name}, {case.pixels}x{case.pixels}, {case.steps} steps")
    say()
    rows = [(stage, median(ours.spent[stage]), median(theirs.spent[stage])) for stage in STAGES]
    print_table(
        ("ms, median", "fleet (hops included)", "Diffusers", "ratio"),
        [(stage, a, b, f"{a / b:.2f}") for stage, a, b in rows],
    )
    difference = (ours.pixels - theirs.pixels).abs()
    finite = bool(ours.latents.isfinite().all())
    say(f"Latents: relative L2 error {_error(ours.latents, theirs.latents):.2e}; all finite: {finite}")
    if exact is not None:
        apart = f"fleet {_error(ours.latents, exact):.2e}, Diffusers {_error(theirs.latents, exact):.2e}"
        say(f"Latents against Diffusers in float32: {apart}")
    say(f"Pixels in [0, 1]: largest difference {float(difference.max()):.4f}, mean {float(difference.mean()):.6f}")
    say(f"The fleet was ready in {ready:.1f} s. Diffusers took {loaded - began:.0f} s in total, including loading")
    say()
    return theirs.latents


def _error(ours: Tensor, theirs: Tensor) -> float:
    """L2 norm of the difference divided by the L2 norm of the reference."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def draw_with_diffusers(case: Case, device: torch.device, repeats: int) -> SideResult:
    """Run Diffusers' pipeline stage by stage, after a short warm-up."""
    pipeline = FluxPipeline.from_pretrained(case.directory, dtype=case.dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    _reference(pipeline, case, device, steps=2)
    runs = [_reference(pipeline, case, device, steps=case.steps) for _ in range(repeats)]
    drawn = SideResult(runs[-1][0], runs[-1][1])
    for _, _, spent in runs:
        for stage, value in spent.items():
            drawn.spent[stage].append(value)
    return drawn


@torch.inference_mode()
def _reference(
    pipeline: Any, case: Case, device: torch.device, *, steps: int
) -> tuple[Tensor, Tensor, dict[str, float]]:
    began = now(device)
    embeds, pooled, _ = pipeline.encode_prompt(
        PROMPT, prompt_2=None, device=device, max_sequence_length=case.text_tokens
    )
    encoded = now(device)
    latents = pipeline(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        height=case.pixels,
        width=case.pixels,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="latent",
    ).images
    denoised = now(device)
    raw = pipeline._unpack_latents(latents, case.pixels, case.pixels, pipeline.vae_scale_factor)
    vae = pipeline.vae
    decoded = vae.decode(raw / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    pixels = pipeline.image_processor.postprocess(decoded, output_type="pt").float().cpu()
    finished = now(device)
    loop = 1e3 * (denoised - encoded)
    return (
        latents.cpu(),
        pixels,
        {
            "text encoding": 1e3 * (encoded - began),
            "denoising": loop,
            "a step": loop / steps,
            "decoding": 1e3 * (finished - denoised),
            "whole request": 1e3 * (finished - began),
        },
    )


def draw_with_fleet(case: Case, endpoint: str, repeats: int) -> SideResult:
    """Run the request on the fleet, after a short warm-up. A stage lasts until the start of the next stage."""
    caller = Caller(endpoint)
    caller.generate(_parameters(case, steps=2))
    runs = [caller.generate(_parameters(case, steps=case.steps)) for _ in range(repeats)]
    caller.close()
    tensors = load(runs[-1].files[0])
    drawn = SideResult(tensors["latents"], tensors["pixels"])
    for run in runs:
        for stage, value in _spent(run, case.steps).items():
            drawn.spent[stage].append(value)
    return drawn


def _parameters(case: Case, *, steps: int) -> api.GenerationParameters:
    parameters = api.GenerationParameters(
        prompt=PROMPT,
        height=case.pixels,
        width=case.pixels,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        seed=SEED,
        output_format=api.OUTPUT_FORMAT_SAFETENSORS,
    )
    parameters.params["max_sequence_length"].int_value = case.text_tokens
    return parameters


def _spent(run: Timeline, steps: int) -> dict[str, float]:
    encoding, denoising, decoding = (run.services[name] for name in ("text_encoding", "denoising", "decoding"))
    return {
        "text encoding": 1e3 * (denoising[0] - encoding[0]),
        "denoising": 1e3 * (decoding[0] - denoising[0]),
        "a step": 1e3 * (denoising[1] - denoising[0]) / steps,
        "decoding": 1e3 * (run.finished - decoding[0]),
        "whole request": 1e3 * run.finished,
    }


if __name__ == "__main__":
    main()
