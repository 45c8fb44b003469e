"""All LTX-2 stages on CUDA compared with Diffusers in one run: random weights of published size.

Both sides share the weights in GPU memory, which is too small for two copies of 68 GB (LTX-2) or 71 GB (LTX-2.3).
Diffusers' pipelines run first, divided into stages; then the fleet's stages run in this process, without RPCs
(cuda_flux.py includes RPCs). The output has times and peak memory of the stages, the relative error of the latents, and
time and error of one prediction against Diffusers' model in float32. No network and no disk space are needed.

Run it with: python tests/bench/cuda_ltx2.py; to try it without a GPU: --device cpu --scale tiny
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from bench_device import empty, now
from bench_image import png, smooth_image
from bench_inputs import LTX2_FRAME_RATE as FRAME_RATE
from bench_inputs import ltx2_step, ltx2_tokens
from bench_ltx2_model import VERSIONS, Modules, build, config_of, loaded_of, same_weights, stages_of
from bench_report import median, print_machine, print_table, say
from bench_sides import Side, StageMeter, latents_error, print_sides
from bench_steps import RequestSteps, new_pool
from bench_weights import on
from bench_works import WORKS
from denoise_step import STEPS, error, float32_predictions, in_turns, step_milliseconds
from diffusers import LTX2ImageToVideoPipeline, LTX2Pipeline
from PIL import Image
from torch import Tensor, nn

from common.artifacts import ImageInputs
from common.local import HostedStages
from common.stage import Call
from configs.pipeline_configs.ltx2 import LTX2ImageToVideoPipelineConfig, LTX2PipelineConfig
from configs.sample.ltx2 import LTX2ImageToVideoSamplingParams, LTX2SamplingParams
from models.dits.ltx2 import LTX2VideoTransformer3DModel as OurTransformer
from models.kernels.trials import try_packages
from models.pipelines import ltx2 as pipelines
from models.runtime import Runtime

PROMPT = "a red apple on the old stone, and the river"
SEED = 7
DTYPE = torch.bfloat16
PREPARATION = "latent_preparation"
IMAGE_PREPARATION = "image_encoding and latent_preparation"
VIDEO_ALONE = "decoding, video VAE only"
SOUND_ALONE = "decoding, audio VAE and vocoder only"
COPIES = "decoding, copies to the host"

Request = dict[str, Any]

SIZES: dict[str, Request] = {
    # Defaults of Diffusers' pipelines.
    "full": {"height": 512, "width": 768, "num_frames": 121, "max_sequence_length": 1024},
    "tiny": {"height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 32},
}
_WITHOUT_STG: Request = {"stg_scale": 0.0, "audio_stg_scale": 0.0}
_WITHOUT_ISOLATED: Request = {"modality_scale": 1.0, "audio_modality_scale": 1.0}


@dataclass(frozen=True)
class Case:
    """A request: parameters with equal names on both sides, and an optional image."""

    request: Request
    image: Image.Image | None = None

    @property
    def title(self) -> str:
        """Size, steps, inputs and number of branches."""
        size = "{height}x{width}, {num_frames} frames, {num_inference_steps} steps".format(**self.request)
        branches = LTX2SamplingParams(**self.request).branches
        return f"{size}, {branches} branches, {'from text' if self.image is None else 'from an image'}"


def main() -> None:
    """Measure one version and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="ltx-2", choices=tuple(VERSIONS))
    parser.add_argument("--scale", default="full", choices=tuple(SIZES))
    parser.add_argument("--steps", type=int, default=4, help="denoising steps")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of five predictions")
    args = parser.parse_args()
    device = torch.device(args.device)
    try_packages(device)
    print_machine(f"{args.model} on {args.device}, against Diffusers in the same run")
    if device.type == "cuda":
        say(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
        say()
    began = now(device)
    modules = build(VERSIONS[args.model], device, tiny=args.scale == "tiny")
    print_modules(modules, now(device) - began)
    cases = cases_of(args.model, {**SIZES[args.scale], "num_inference_steps": args.steps}, args.scale)
    references = [run_diffusers(modules, case, device) for case in cases]
    ours = same_weights(modules["transformer"])
    for case, theirs in zip(cases, references, strict=True):
        print_case(case, run_stages(modules, ours, case, device), theirs)
    measure_prediction(modules["transformer"], ours, SIZES[args.scale], device, args.repeats)


def print_modules(modules: Modules, seconds: float) -> None:
    """Print the parameter counts of the modules, and the time to draw them."""
    networks = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
    counts = {name: sum(each.numel() for each in module.parameters()) / 1e9 for name, module in networks.items()}
    print_table(("module", "1e9 parameters"), counts.items())
    say(f"{sum(counts.values()):.1f}e9 random parameters, drawn in {seconds:.1f} s")
    say()


def cases_of(model: str, size: Request, scale: str) -> list[Case]:
    """Requests: text with two branches, text with all branches of the version, an image with two branches."""
    blocks = (28.0,) if scale == "full" else (1.0,)
    shared: Request = {"prompt": PROMPT, "seed": SEED, "spatio_temporal_guidance_blocks": blocks, **size}
    negative = {**shared, **_WITHOUT_STG, **_WITHOUT_ISOLATED}
    # LTX-2 has no perturbed branch: with STG, Diffusers would compute the positive branch twice, and ours once.
    every = shared if model == "ltx-2.3" else {**shared, **_WITHOUT_STG}
    return [Case(negative), Case(every), Case(negative, smooth_image(size["height"], size["width"]))]


def print_case(case: Case, ours: Side, theirs: Side) -> None:
    """Print the stages of both sides and the errors of the latents."""
    say(f"## {DTYPE}, {case.title}")
    say()
    print_sides(ours, theirs)
    for part in ("video", "audio"):
        say(f"Latents of {part}: relative L2 error {latents_error(ours, theirs, part):.2e}")
    say()


@torch.inference_mode()
def run_diffusers(modules: Modules, case: Case, device: torch.device) -> Side:
    """Run the reference for warm-up, then timed. Hooks divide its call into stages."""
    pipeline: Any = (LTX2Pipeline if case.image is None else LTX2ImageToVideoPipeline)(**modules)
    pipeline.set_progress_bar_config(disable=True)
    request = dict(case.request)
    seed = request.pop("seed")
    request["spatio_temporal_guidance_blocks"] = [int(each) for each in request["spatio_temporal_guidance_blocks"]]
    if case.image is not None:
        request["image"] = case.image
    side = Side()
    meter = StageMeter(device, side)
    for _ in range(2):
        generator = torch.Generator("cpu").manual_seed(seed)
        with_hooks(modules, meter, PREPARATION if case.image is None else IMAGE_PREPARATION)
        meter.restart()
        video, audio = pipeline(**request, generator=generator, output_type="latent", return_dict=False)
        meter.end("denoising")
        pixels = pipeline.vae.decode(video.to(DTYPE), None, return_dict=False)[0]
        meter.end(VIDEO_ALONE)
        samples = pipeline.vocoder(pipeline.audio_vae.decode(audio.to(DTYPE), return_dict=False)[0])
        meter.end(SOUND_ALONE)
        pipeline.video_processor.postprocess_video(pixels, output_type="pt").float().cpu()
        samples.float().cpu()
        meter.end(COPIES)
        side.latents = {"video": video.cpu(), "audio": audio.cpu()}
        del video, audio, pixels, samples
    side.join("decoding", (VIDEO_ALONE, SOUND_ALONE, COPIES))
    empty(device)
    return side


def with_hooks(modules: Modules, meter: StageMeter, preparation: str) -> None:
    """Mark the ends of two stages in one call.

    Text encoding ends when the connectors return, preparation at the first prediction.
    """

    def end_text(*_: object) -> None:
        meter.end("text_encoding")
        text.remove()

    def end_preparation(*_: object) -> None:
        meter.end(preparation)
        first.remove()

    text = modules["connectors"].register_forward_hook(end_text)
    first = modules["transformer"].register_forward_pre_hook(end_preparation)


def run_stages(modules: Modules, transformer: OurTransformer, case: Case, device: torch.device) -> Side:
    """Run the fleet's services in order, each for warm-up and then timed."""
    is_text = case.image is None
    config = config_of(modules, LTX2PipelineConfig if is_text else LTX2ImageToVideoPipelineConfig)
    services = (pipelines.LTX2Pipeline if is_text else pipelines.LTX2ImagePipeline)(pipelines.MODULES).services
    sampling = LTX2SamplingParams if is_text else LTX2ImageToVideoSamplingParams
    slots: dict[str, Any] = sampling(output_format="safetensors", **case.request).artifacts()
    if case.image is not None:
        slots["image_inputs"] = ImageInputs(
            images={"image": torch.frombuffer(bytearray(png(case.image)), dtype=torch.uint8)}
        )
    loaded = loaded_of(modules, transformer)
    runtime, side = Runtime(device=device, dtype=DTYPE), Side()
    for spec in services:
        stages = HostedStages(spec.service, stages_of(spec, config, runtime, loaded))
        inputs = {slot: slots[slot] for slot in stages.contract.inputs if slot in slots}
        meter = StageMeter(device, side)
        for _ in range(2):
            meter.restart()
            outputs = stages.run(inputs, Call("bench"))
            meter.end(spec.service)
        if spec.service == "decoding":
            meter.restart()
            stages.run({**inputs, "canvas": replace(inputs["canvas"], output_format="mp4")}, Call("bench"))
            meter.end(f"decoding to MP4 (noise, {os.cpu_count()} cores)")
        slots |= outputs
        del stages
        empty(device)
    latents = {part: each.latents.to(device) for part, each in slots["denoised_latents"].parts.items()}
    decode_parts(latents, loaded, side, device)
    side.latents = {
        "video": loaded["vae"].denormalized(latents["video"]).cpu(),
        "audio": loaded["audio_vae"].denormalized(latents["audio"]).cpu(),
    }
    if case.image is not None:
        side.join(IMAGE_PREPARATION, ("image_encoding", PREPARATION))
    return side


@torch.inference_mode()
def decode_parts(latents: Mapping[str, Tensor], loaded: Modules, side: Side, device: torch.device) -> None:
    """Measure only the decoders: frames and samples on the device, without a file."""
    meter = StageMeter(device, side)
    for _ in range(2):
        meter.restart()
        frames = list(loaded["vae"].decode(latents["video"].to(DTYPE)))
        meter.end(VIDEO_ALONE)
        samples = loaded["vocoder"](loaded["audio_vae"].decode(latents["audio"]))
        meter.end(SOUND_ALONE)
        del frames, samples


@torch.inference_mode()
def measure_prediction(theirs: Any, ours: OurTransformer, size: Request, device: torch.device, repeats: int) -> None:
    """Time one prediction of the positive branch, alternating sides, and print its error against float32."""
    reference, given = (on(device, each) for each in ltx2_step(**step_sizes(ours, size)))
    exact = float32_predictions(theirs, reference)
    latents, timestep = {name: given.pop(name) for name in WORKS["ltx2"].latents}, given.pop("timestep")
    with RequestSteps(new_pool(device), ours, timestep[None].expand(STEPS, -1), given, latents) as steps:
        sides: dict[str, Callable[[], tuple[Tensor, ...]]] = {
            "ours": lambda: ltx2_tokens(steps.predict_parts(latents, 0)),
            "Diffusers": lambda: theirs(**reference, return_dict=False),
        }
        errors = {name: [error(*pair) for pair in zip(run(), exact, strict=True)] for name, run in sides.items()}
        spent = in_turns(sides, partial(step_milliseconds, device=device), repeats)
    say("## One prediction")
    say()
    print_table(
        ("", "ms", "fastest", "error of video", "error of audio"),
        [(name, median(each), min(each), *(f"{value:.2e}" for value in errors[name])) for name, each in spent.items()],
    )
    say(f"Ours takes {median(spent['ours']) / median(spent['Diffusers']):.2f} times as long as Diffusers")


def step_sizes(ours: OurTransformer, size: Request) -> Request:
    """Arguments of ltx2_step() for a request size."""
    config = ours.config
    rows, columns = (size[side] // config.spatial_factor for side in ("height", "width"))
    per_second = config.audio_sampling_rate / config.audio_hop_length / config.audio_factor
    return {
        "grid": ((size["num_frames"] - 1) // config.temporal_factor + 1, rows, columns),
        "sound": round(size["num_frames"] / FRAME_RATE * per_second),
        "text": size["max_sequence_length"],
        "widths": tuple(config.caption_channels or each.hidden_size for each in (config.video, config.audio)),
        "channels": (config.video.in_channels, config.audio.in_channels),
    }


if __name__ == "__main__":
    main()
