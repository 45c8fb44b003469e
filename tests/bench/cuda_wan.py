"""All Wan stages on CUDA compared with Diffusers in one run: random weights of published size.

The model is Wan 2.1 with text, or Wan 2.2 TI2V-5B with text and then also with an image. Diffusers' modules run first
and are timed stage by stage; after they are freed, the fleet's stages run in this process, without RPCs (cuda_flux.py
includes RPCs). The output has times and peak memory of the stages (without the weights), and the relative error of the
latents. No network is needed: the checkpoint (15 or 22 GB, including UMT5-XXL) is generated on the GPU, written to
--directory and removed at the end.

Run it with: python tests/bench/cuda_wan.py; to try it without a GPU: --device cpu --scale tiny
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from bench_device import empty, now
from bench_image import png, smooth_image
from bench_report import print_machine, say
from bench_sides import Side, StageMeter, latents_error, print_sides
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from torch import Tensor
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from common.artifacts import ImageInputs
from common.local import HostedStages
from common.stage import Call
from models.catalog import ServedModel, open_model
from models.kernels.trials import try_packages
from models.loader import load_stages
from models.registry import load_registry
from models.runtime import Runtime
from models.vaes.wan import load_wan_vae
from models.validation import InputValidationStage

PROMPT = "a red heart beating on a yellow background"
SEED = 7
FRAMES_ALONE = "decoding, frames only"


@dataclass(frozen=True)
class Scale:
    """Module sizes and video size; `index` adds entries to model_index.json."""

    dit: dict[str, Any]
    text: dict[str, int]
    vae: dict[str, Any]
    height: int
    width: int
    frames: int
    flow_shift: float = 3.0
    index: dict[str, Any] = field(default_factory=dict)


_UMT5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
_TINY_TEXT = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 1024}
_TINY_DIT = {"num_attention_heads": 2, "ffn_dim": 128, "num_layers": 2, "text_dim": 64}
_TI2V = {"in_channels": 48, "out_channels": 48}
_RESIDUAL_VAE = {
    "z_dim": 48,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
SCALES = {
    "wan2.1": {
        # Wan2.1-T2V-1.3B as published, at its native 480p.
        "full": Scale(
            dit={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096},
            text=_UMT5_XXL,
            vae={"base_dim": 96},
            height=480,
            width=832,
            frames=81,
        ),
        "tiny": Scale(dit=_TINY_DIT, text=_TINY_TEXT, vae={"base_dim": 16}, height=64, width=96, frames=9),
    },
    "ti2v": {
        # Wan2.2-TI2V-5B as published, at its native 720p.
        "full": Scale(
            dit={"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "text_dim": 4096, **_TI2V},
            text=_UMT5_XXL,
            vae={"base_dim": 160, "decoder_base_dim": 256, **_RESIDUAL_VAE},
            height=704,
            width=1280,
            frames=121,
            flow_shift=5.0,
            index={"expand_timesteps": True},
        ),
        "tiny": Scale(
            dit={**_TINY_DIT, **_TI2V},
            text=_TINY_TEXT,
            vae={"base_dim": 16, "decoder_base_dim": 16, **_RESIDUAL_VAE},
            height=64,
            width=96,
            frames=9,
            flow_shift=5.0,
            index={"expand_timesteps": True},
        ),
    },
}


def main() -> None:
    """Measure one model and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="wan2.1", choices=tuple(SCALES))
    parser.add_argument("--scale", default="full", choices=("full", "tiny"))
    parser.add_argument("--steps", type=int, default=4, help="denoising steps")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()) / "wan-random",
        help="temporary folder of the random checkpoint",
    )
    args = parser.parse_args()
    device, scale = torch.device(args.device), SCALES[args.model][args.scale]
    try_packages(device)
    print_machine(f"{args.model} on {args.device}, against Diffusers in the same run")
    if device.type == "cuda":
        say(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
        say()
    try:
        build(args.directory, scale, device)
        given = {
            "height": scale.height,
            "width": scale.width,
            "num_frames": scale.frames,
            "num_inference_steps": args.steps,
            "guidance_scale": 5.0,
        }
        measure(args.directory, given, device, torch.bfloat16, None)
        if scale.index.get("expand_timesteps"):
            measure(args.directory, given, device, torch.bfloat16, smooth_image(scale.height, scale.width))
    finally:
        shutil.rmtree(args.directory, ignore_errors=True)


def build(path: Path, scale: Scale, device: torch.device) -> None:
    """Write the checkpoint, with the emoji video model's tokenizer."""
    torch.manual_seed(0)
    emoji = open_model("emoji-video", load_registry()).checkpoint.path
    text = UMT5Config(**scale.text, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            modules = {
                "transformer": WanTransformer3DModel(attention_head_dim=128, **scale.dit),
                "vae": AutoencoderKLWan(**scale.vae),
                "text_encoder": UMT5EncoderModel(text),
            }
    finally:
        torch.set_default_dtype(previous)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=scale.flow_shift
    )
    tokenizer = T5TokenizerFast.from_pretrained(emoji / "tokenizer")
    WanPipeline(tokenizer=tokenizer, scheduler=scheduler, **modules, **scale.index).save_pretrained(
        path, max_shard_size="5GB"
    )
    del modules
    empty(device)


def measure(
    path: Path, given: dict[str, Any], device: torch.device, dtype: torch.dtype, image: Image.Image | None
) -> None:
    """Run both sides for warm-up, then timed, and print the tables."""
    theirs = run_diffusers(path, given, device, dtype, image)
    theirs.spent[FRAMES_ALONE] = theirs.spent["decoding"]
    empty(device)
    ours = run_stages(path, given, device, dtype, image)
    size = f"{given['height']}x{given['width']}, {given['num_frames']} frames, {given['num_inference_steps']} steps"
    say(f"## {dtype}, {size}, {'from text' if image is None else 'from an image'}")
    say()
    print_sides(ours, theirs)
    say(f"Latents: relative L2 error {latents_error(ours, theirs, 'video'):.2e}")
    say()


@torch.inference_mode()
def run_diffusers(
    path: Path, given: dict[str, Any], device: torch.device, dtype: torch.dtype, image: Image.Image | None
) -> Side:
    """Run the reference; with an image, its denoising includes image encoding."""
    kind = WanPipeline if image is None else WanImageToVideoPipeline
    pipeline = kind.from_pretrained(path, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    side = Side()
    more = {} if image is None else {"image": image}
    for _ in range(2):
        generator = torch.Generator("cpu").manual_seed(SEED)
        meter = StageMeter(device, side)
        embeds, negative = pipeline.encode_prompt(PROMPT, max_sequence_length=512, device=device)
        meter.end("text_encoding")
        latents = pipeline(
            prompt_embeds=embeds,
            negative_prompt_embeds=negative,
            generator=generator,
            output_type="latent",
            **more,
            **given,
        ).frames
        meter.end("denoising")
        shape = (1, pipeline.vae.config.z_dim, 1, 1, 1)
        mean, std = (
            torch.tensor(values, device=device, dtype=dtype).view(shape)
            for values in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
        )
        decoded = pipeline.vae.decode(latents.to(dtype) * std + mean, return_dict=False)[0]
        pipeline.video_processor.postprocess_video(decoded, output_type="pt").float().cpu()
        meter.end("decoding")
        side.latents["video"] = latents.cpu()
        del decoded, latents
    return side


def run_stages(
    path: Path, given: dict[str, Any], device: torch.device, dtype: torch.dtype, image: Image.Image | None
) -> Side:
    """Run the fleet's services in order."""
    model = open_model(str(path), load_registry())
    request = {"prompt": PROMPT, "seed": SEED, "output_format": "safetensors", **given}
    images = {} if image is None else {"image": png(image)}
    validated = InputValidationStage(model).run(request, images)
    slots: dict[str, Any] = dict(validated.artifacts)
    if images:
        files = {role: torch.frombuffer(bytearray(data), dtype=torch.uint8) for role, data in images.items()}
        slots["image_inputs"] = ImageInputs(images=files)
    side = Side()
    for spec in validated.variant.services:
        runtime, name = Runtime(device=device, dtype=dtype), validated.variant.name
        stages = HostedStages(spec.service, load_stages(model, spec, runtime, variant=name))
        inputs = {slot: slots[slot] for slot in stages.contract.inputs if slot in slots}
        for _ in range(2):
            meter = StageMeter(device, side)
            outputs = stages.run(inputs, Call("bench"))
            meter.end(spec.service)
        slots |= outputs
        if spec.service == "decoding":
            meter.restart()
            stages.run({**inputs, "canvas": replace(inputs["canvas"], output_format="mp4")}, Call("bench"))
            meter.end(f"decoding to MP4 (noise, {os.cpu_count()} cores)")
            side.latents["video"] = inputs["denoised_latents"].parts["video"].latents
            side.spent[FRAMES_ALONE] = decode_frames(model, side.latents["video"], device, dtype)
        del stages
        empty(device)
    return side


@torch.inference_mode()
def decode_frames(model: ServedModel, latents: Tensor, device: torch.device, dtype: torch.dtype) -> float:
    """Time in ms of the VAE only: frames on the device, without a file."""
    vae = load_wan_vae(model.checkpoint, "vae", device, dtype)
    given = latents.to(device, dtype)
    spent = 0.0
    for _ in range(2):
        began = now(device)
        for _ in vae.decode(given):
            pass
        spent = 1e3 * (now(device) - began)
    return spent


if __name__ == "__main__":
    main()
