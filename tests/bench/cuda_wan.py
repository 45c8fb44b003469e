"""Every stage of Wan 2.1 text to video on CUDA, next to Diffusers in the same run: random weights of published size.

Diffusers' modules run first and are timed stage by stage; then they leave the card, and the fleet's stages run in this
process, without hops (cuda_flux.py has those). Printed are stage times, the relative error of the latents, and what
decoding takes beside the weights. Needs no network: the checkpoint (about 15 GB, UMT5-XXL included) is drawn on the
card, written to --directory and removed at the end.

Run it with: python tests/bench/cuda_wan.py; to try its logic without a card: --device cpu --scale tiny
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_device import empty, now
from bench_report import print_machine, print_table, print_verdict, say
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

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
STAGES = ("text_encoding", "latent_preparation", "denoising", "decoding")
DECODING_BUDGET_GB = 4.0


@dataclass(frozen=True)
class Scale:
    """Sizes of the modules, and of the video."""

    dit: dict[str, Any]
    text: dict[str, int]
    vae_dim: int
    height: int
    width: int
    frames: int


SCALES = {
    # Wan2.1-T2V-1.3B as published, at its native 480p.
    "full": Scale(
        dit={"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096},
        text={"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384},
        vae_dim=96,
        height=480,
        width=832,
        frames=81,
    ),
    "tiny": Scale(
        dit={"num_attention_heads": 2, "ffn_dim": 128, "num_layers": 2, "text_dim": 64},
        text={"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 1024},
        vae_dim=16,
        height=64,
        width=96,
        frames=9,
    ),
}


def main() -> None:
    """Measure in every dtype asked for, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=tuple(SCALES))
    parser.add_argument("--steps", type=int, default=4, help="steps of the loop")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "wan-random")
    args = parser.parse_args()
    device, scale = torch.device(args.device), SCALES[args.scale]
    try_packages(device)
    print_machine(f"Wan 2.1 on {args.device}, against Diffusers in the same run")
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
        measure(args.directory, given, device, torch.bfloat16)
    finally:
        shutil.rmtree(args.directory, ignore_errors=True)


def build(path: Path, scale: Scale, device: torch.device) -> None:
    """Write the checkpoint. The tokenizer is the emoji video model's."""
    torch.manual_seed(0)
    emoji = open_model("emoji-video", load_registry()).checkpoint.path
    text = UMT5Config(**scale.text, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            modules = {
                "transformer": WanTransformer3DModel(attention_head_dim=128, **scale.dit),
                "vae": AutoencoderKLWan(base_dim=scale.vae_dim),
                "text_encoder": UMT5EncoderModel(text),
            }
    finally:
        torch.set_default_dtype(previous)
    WanPipeline(
        tokenizer=T5TokenizerFast.from_pretrained(emoji / "tokenizer"),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        **modules,
    ).save_pretrained(path, max_shard_size="5GB")
    del modules
    empty(device)


def measure(path: Path, given: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """Both sides once to warm up and once for the clock."""
    theirs, their_latents, _ = run_diffusers(path, given, device, dtype)
    empty(device)
    ours, our_latents, taken = run_stages(path, given, device, dtype)
    size = f"{given['height']}x{given['width']}, {given['num_frames']} frames, {given['num_inference_steps']} steps"
    say(f"## {dtype}, {size}")
    say()
    rows = [(name, ours[name], theirs[name], f"{ours[name] / theirs[name]:.2f}") for name in STAGES if name in theirs]
    rows.append(
        ("decoding, frames alone", ours["frames"], theirs["decoding"], f"{ours['frames'] / theirs['decoding']:.2f}")
    )
    rows.append((f"decoding, with the MP4 of noise ({os.cpu_count()} cores)", ours["mp4"], float("nan"), "-"))
    print_table(("ms", "fleet's stages", "Diffusers", "ratio"), rows)
    error = float((our_latents.double() - their_latents.double()).norm() / their_latents.double().norm())
    say(f"Latents: relative L2 error {error:.2e}; all finite: {bool(our_latents.isfinite().all())}")
    if device.type == "cuda":
        print_verdict("memory of decoding beside the weights", taken / 1e9, DECODING_BUDGET_GB, "GB")


@torch.inference_mode()
def run_diffusers(
    path: Path, given: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Milliseconds by stage, latents and pixels of the reference."""
    pipeline = WanPipeline.from_pretrained(path, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    spent: dict[str, float] = {}
    for _ in range(2):
        generator = torch.Generator("cpu").manual_seed(SEED)
        began = now(device)
        embeds, negative = pipeline.encode_prompt(PROMPT, max_sequence_length=512, device=device)
        encoded = now(device)
        latents = pipeline(
            prompt_embeds=embeds, negative_prompt_embeds=negative, generator=generator, output_type="latent", **given
        ).frames
        denoised = now(device)
        shape = (1, pipeline.vae.config.z_dim, 1, 1, 1)
        mean, std = (
            torch.tensor(values, device=device, dtype=dtype).view(shape)
            for values in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
        )
        decoded = pipeline.vae.decode(latents.to(dtype) * std + mean, return_dict=False)[0]
        pixels = pipeline.video_processor.postprocess_video(decoded, output_type="pt").float().cpu()
        times = (encoded - began, denoised - encoded, now(device) - denoised)
        spent = {name: 1e3 * each for name, each in zip(("text_encoding", "denoising", "decoding"), times, strict=True)}
    return spent, latents.cpu(), pixels


def run_stages(
    path: Path, given: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, float], Tensor, int]:
    """Milliseconds by service, latents, and the bytes that decoding took beside the weights."""
    model = open_model(str(path), load_registry())
    request = {"prompt": PROMPT, "seed": SEED, "output_format": "safetensors", **given}
    slots: dict[str, Any] = dict(InputValidationStage(model).run(request).artifacts)
    spent: dict[str, float] = {}
    taken = 0
    for spec in model.services:
        stages = HostedStages(spec.service, load_stages(model, spec, Runtime(device=device, dtype=dtype)))
        inputs = {name: slots[name] for name in stages.contract.inputs if name in slots}
        before = 0
        for _ in range(2):
            if device.type == "cuda":
                before = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
            began = now(device)
            outputs = stages.run(inputs, Call("bench"))
            spent[spec.service] = 1e3 * (now(device) - began)
        if device.type == "cuda":
            taken = torch.cuda.max_memory_allocated(device) - before
        slots |= outputs
        if spec.service == "decoding":
            began = now(device)
            stages.run({**inputs, "canvas": replace(inputs["canvas"], output_format="mp4")}, Call("bench"))
            spent["mp4"] = 1e3 * (now(device) - began)
            spent["frames"] = decode_frames(model, inputs["denoised_latents"].parts["video"].latents, device, dtype)
        del stages
        empty(device)
    return spent, slots["denoised_latents"].parts["video"].latents, taken


@torch.inference_mode()
def decode_frames(model: ServedModel, latents: Tensor, device: torch.device, dtype: torch.dtype) -> float:
    """Milliseconds of the VAE's own work: frames on the device, of no file."""
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
