"""Every stage of LTX-2 on CUDA, next to Diffusers in the same run: random weights of published width.

The published model has 48 blocks, and its text encoder 48 layers; --layers and --text-layers say how many are drawn
here, so that the checkpoint fits the disk. Diffusers' modules run first and are timed stage by stage; then they leave
the GPU, and the fleet's stages run in this process. Printed are times and peak memory of the stages (beside the
weights), and the relative error of both latents. All four branches of guidance are on. The connectors' time is in
Diffusers' denoising and in the fleet's text encoding.

Run it with: python tests/bench/cuda_ltx2.py; to try its logic without a GPU: --device cpu --scale tiny
"""

from __future__ import annotations

import argparse
import os
import shutil
import string
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_device import empty
from bench_report import print_machine, print_table, say
from cuda_wan import PROMPT, SEED, Meter, Side, png
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2VocoderWithBWE
from PIL import Image
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GemmaTokenizer

from common.artifacts import ImageInputs
from common.local import HostedStages
from common.stage import Call
from models.catalog import open_model
from models.kernels.trials import try_packages
from models.loader import load_stages
from models.registry import load_registry
from models.runtime import Runtime
from models.validation import InputValidationStage

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Scale:
    """Sizes of the modules where they are not the published ones, and of the video."""

    transformer: dict[str, Any]
    text: dict[str, int]
    connectors: dict[str, Any]
    vae: dict[str, Any]
    height: int
    width: int
    frames: int


_NEW: dict[str, Any] = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "rope_type": "split",
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
SCALES = {
    # LTX-2.3's widths, at the size of Diffusers' defaults.
    "full": Scale(
        transformer=_NEW,
        text={
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
        },
        connectors={
            "video_connector_num_attention_heads": 32,
            "audio_connector_num_attention_heads": 32,
            "audio_connector_attention_head_dim": 64,
        },
        vae={},
        height=512,
        width=768,
        frames=121,
    ),
    "tiny": Scale(
        transformer={
            **_NEW,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "cross_attention_dim": 128,
            "audio_num_attention_heads": 4,
            "audio_attention_head_dim": 16,
            "audio_cross_attention_dim": 64,
        },
        text={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
        },
        connectors={
            "caption_channels": 64,
            "video_connector_num_attention_heads": 4,
            "video_connector_attention_head_dim": 32,
            "audio_connector_num_attention_heads": 4,
            "audio_connector_attention_head_dim": 16,
            "video_hidden_dim": 128,
            "audio_hidden_dim": 64,
        },
        vae={"block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 3, "upsample_factor": (1, 1, 1)},
        height=64,
        width=96,
        frames=9,
    ),
}


def main() -> None:
    """Measure from text and from an image, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=tuple(SCALES))
    parser.add_argument("--layers", type=int, default=12, help="blocks of the transformer; 48 are published")
    parser.add_argument("--text-layers", type=int, default=12, help="layers of the text encoder; 48 are published")
    parser.add_argument("--steps", type=int, default=4, help="steps of the loop")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "ltx2-random")
    args = parser.parse_args()
    device, scale = torch.device(args.device), SCALES[args.scale]
    try_packages(device)
    print_machine(f"LTX-2 with {args.layers} blocks on {args.device}, against Diffusers in the same run")
    given = {
        "height": scale.height,
        "width": scale.width,
        "num_frames": scale.frames,
        "num_inference_steps": args.steps,
    }
    try:
        build(args.directory, scale, args.layers, args.text_layers, device)
        for image in (None, Image.effect_mandelbrot((scale.width, scale.height), (-2, -1, 1, 1), 50).convert("RGB")):
            measure(args.directory, given, args.layers, device, image)
    finally:
        shutil.rmtree(args.directory, ignore_errors=True)


def build(path: Path, scale: Scale, layers: int, text_layers: int, device: torch.device) -> None:
    """Write the checkpoint."""
    torch.manual_seed(0)
    tokenizer = words_tokenizer()
    text = {**scale.text, "num_hidden_layers": text_layers, "vocab_size": 1024, "query_pre_attn_scalar": 256}
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    gemma = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    connectors = {"rope_type": "split", "per_modality_projections": True, "proj_bias": True, **scale.connectors}
    connectors |= {"video_gated_attn": True, "audio_gated_attn": True}
    vae = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8, **scale.vae}
    previous = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with device:
            modules = {
                "transformer": LTX2VideoTransformer3DModel(num_layers=layers, **scale.transformer),
                "connectors": LTX2TextConnectors(text_proj_in_factor=text_layers + 1, **connectors),
                "text_encoder": Gemma3ForConditionalGeneration(gemma),
                "vae": AutoencoderKLLTX2Video(**vae),
                "audio_vae": AutoencoderKLLTX2Audio(),
                "vocoder": LTX2VocoderWithBWE(),
            }
    finally:
        torch.set_default_dtype(previous)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
    )
    LTX2Pipeline(tokenizer=tokenizer, scheduler=scheduler, **modules).save_pretrained(path, max_shard_size="5GB")
    del modules
    empty(device)


def words_tokenizer() -> GemmaTokenizer:
    """A tokenizer of bytes, letters and the words of the prompt."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += string.ascii_lowercase
    merges: list[tuple[str, str]] = []
    for word in PROMPT.split():
        for end in range(1, len(word)):
            if word[: end + 1] not in tokens:
                merges.append((word[:end], word[end]))
                tokens.append(word[: end + 1])
    return GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)


def measure(path: Path, given: dict[str, Any], layers: int, device: torch.device, image: Image.Image | None) -> None:
    """Both sides once to warm up and once for the clock."""
    request = {**given, "spatio_temporal_guidance_blocks": (float(layers // 2),)}
    theirs, their_sound = run_diffusers(path, request, device, image)
    empty(device)
    ours, our_sound = run_stages(path, request, device, image)
    size = f"{given['height']}x{given['width']}, {given['num_frames']} frames, {given['num_inference_steps']} steps"
    say(f"## {DTYPE}, {size}, {'from text' if image is None else 'from an image'}")
    say()
    rows = [
        (name, spent, theirs.spent.get(name, float("nan")), f"{spent / theirs.spent[name]:.2f}")
        if name in theirs.spent
        else (name, spent, float("nan"), "-")
        for name, spent in ours.spent.items()
    ]
    print_table(("ms", "fleet's stages", "Diffusers", "ratio"), rows)
    if device.type == "cuda":
        peaks = [(name, peak / 1e9, theirs.peaks.get(name, float("nan")) / 1e9) for name, peak in ours.peaks.items()]
        print_table(("GB beside the weights", "fleet's stages", "Diffusers"), peaks)
    for name, mine, reference in (("video", ours.latents, theirs.latents), ("audio", our_sound, their_sound)):
        error = float((mine.double() - reference.double()).norm() / reference.double().norm())
        say(f"Latents of {name}: relative L2 error {error:.2e}; all finite: {bool(mine.isfinite().all())}")
    say()


@torch.inference_mode()
def run_diffusers(
    path: Path, given: dict[str, Any], device: torch.device, image: Image.Image | None
) -> tuple[Side, Tensor]:
    """The reference, and its audio latents; from an image its loop contains the encoding of the image."""
    kind = LTX2Pipeline if image is None else LTX2ImageToVideoPipeline
    pipeline: Any = kind.from_pretrained(path, dtype=DTYPE).to(device)
    pipeline.set_progress_bar_config(disable=True)
    blocks = [int(block) for block in given["spatio_temporal_guidance_blocks"]]
    call = {**given, "spatio_temporal_guidance_blocks": blocks, **({} if image is None else {"image": image})}
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    side, sound = Side(), torch.empty(0)
    for _ in range(2):
        meter = Meter(device, side)
        embeds = dict(zip(names, pipeline.encode_prompt(PROMPT, "", device=device), strict=True))
        meter.end("text_encoding")
        generator = torch.Generator("cpu").manual_seed(SEED)
        latents, sound = pipeline(**embeds, **call, generator=generator, output_type="latent", return_dict=False)
        meter.end("denoising")
        decoded = pipeline.vae.decode(latents.to(DTYPE), None, return_dict=False)[0]
        pipeline.video_processor.postprocess_video(decoded, output_type="pt").float().cpu()
        pipeline.vocoder(pipeline.audio_vae.decode(sound.to(DTYPE), return_dict=False)[0]).float().cpu()
        meter.end("decoding")
        side.latents, sound = latents.cpu(), sound.cpu()
        del decoded, latents
    return side, sound


def run_stages(
    path: Path, given: dict[str, Any], device: torch.device, image: Image.Image | None
) -> tuple[Side, Tensor]:
    """The fleet's stages, one service after the other, and the audio latents as Diffusers returns them."""
    model = open_model(str(path), load_registry())
    images = {} if image is None else {"image": png(image)}
    request = {"prompt": PROMPT, "seed": SEED, "output_format": "safetensors", **given}
    validated = InputValidationStage(model).run(request, images)
    slots: dict[str, Any] = dict(validated.artifacts)
    if images:
        files = {role: torch.frombuffer(bytearray(data), dtype=torch.uint8) for role, data in images.items()}
        slots["image_inputs"] = ImageInputs(images=files)
    side, sound = Side(), torch.empty(0)
    for spec in validated.variant.services:
        runtime, name = Runtime(device=device, dtype=DTYPE), validated.variant.name
        loaded = load_stages(model, spec, runtime, variant=name)
        stages = HostedStages(spec.service, loaded)
        inputs = {slot: slots[slot] for slot in stages.contract.inputs if slot in slots}
        for _ in range(2):
            meter = Meter(device, side)
            outputs = stages.run(inputs, Call("bench"))
            meter.end(spec.service)
        slots |= outputs
        if spec.service == "decoding":
            meter.restart()
            stages.run({**inputs, "canvas": replace(inputs["canvas"], output_format="mp4")}, Call("bench"))
            meter.end(f"decoding, with the MP4 ({os.cpu_count()} cores)")
            side.latents, sound = saved_latents(loaded[0], inputs["denoised_latents"].parts)
        del stages, loaded
        empty(device)
    return side, sound


def saved_latents(stage: Any, parts: Any) -> tuple[Tensor, Tensor]:
    """Latents of video and sound without the normalisation."""
    video = stage._saved("video", parts["video"], stage._vae)
    return video, stage._saved("audio", parts["audio"], stage._audio_vae)


if __name__ == "__main__":
    main()
