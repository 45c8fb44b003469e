"""All Qwen-Image stages on CUDA at 1024x1024, compared with Diffusers in one run.

Weights are random, of published size. Both sides share them in GPU memory, which is too small for two copies of 58 GB.
Diffusers' pipeline runs first, stage by stage; then the fleet's stages run in this process, without RPCs (cuda_flux.py
includes RPCs). The output has stage times and the relative error of the latents. No network and no disk space are
needed; GPU memory is about 70 GB.

Run it with: python tests/bench/cuda_qwen_image.py; to try it without a GPU: --device cpu --scale tiny
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from bench_device import default_dtype, now
from bench_report import print_machine, print_table, say
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from common.artifacts import Canvas, Prompt, Sampling
from common.local import HostedStages
from common.stage import Call, PipelineStage
from configs.models.dits.qwen_image import QwenImageTransformerConfig
from configs.models.vaes.qwen_image import AutoencoderKLQwenImageConfig
from configs.pipeline_configs.packed import SequenceShift
from configs.pipeline_configs.qwen_image import TEMPLATE, QwenImagePipelineConfig
from models.dits.qwen_image import QwenImageTransformer2DModel as OurTransformer
from models.kernels.trials import try_packages
from models.layers.linear import join_all_weights
from models.runtime import Runtime
from models.stages.decoding import DecodingStage
from models.stages.denoising import DenoisingStage
from models.stages.latent_preparation import LatentPreparationStage
from models.stages.text_encoding import TextEncodingStage
from models.stages.timestep_preparation import TimestepPreparationStage
from models.vaes.qwen_image import QwenImageVAE

SEED = 7
TEXT_TOKENS = 200
STAGES = ("text_encoding", "denoising", "decoding")
SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}


@dataclass(frozen=True)
class Scale:
    """Module sizes and image size."""

    dit: dict[str, Any]
    text: dict[str, Any]
    vision: dict[str, Any]
    vae: dict[str, Any]
    pixels: int


SCALES = {
    # Qwen-Image as published: 60 blocks of width 3072, Qwen2.5-VL-7B as the encoder.
    "full": Scale(
        dit={},
        text={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
        vae={},
        pixels=1024,
    ),
    "tiny": Scale(
        dit={
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        text={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        vision={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32},
        vae={"base_dim": 8, "num_res_blocks": 1},
        pixels=128,
    ),
}


def main() -> None:
    """Measure both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=tuple(SCALES))
    parser.add_argument("--steps", type=int, default=8, help="denoising steps")
    args = parser.parse_args()
    device, scale = torch.device(args.device), SCALES[args.scale]
    try_packages(device)
    print_machine(f"Qwen-Image on {args.device}, against Diffusers in the same run")
    if device.type == "cuda":
        say(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
        say()
    modules = build(scale, device)
    theirs, their_latents = run_diffusers(modules, scale, device, args.steps)
    ours, our_latents = run_stages(modules, scale, device, args.steps)
    say(f"## bfloat16, {scale.pixels}x{scale.pixels}, {TEXT_TOKENS} text tokens, {args.steps} steps, no guidance")
    say()
    rows = [(name, ours[name], theirs[name], f"{ours[name] / theirs[name]:.2f}") for name in STAGES]
    print_table(("ms", "fleet's stages", "Diffusers", "ratio"), rows)
    error = float((our_latents.double() - their_latents.double()).norm() / their_latents.double().norm())
    say(f"Latents: relative L2 error {error:.2e}; all finite: {bool(our_latents.isfinite().all())}")


def byte_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer with one token per byte and per special token of the template."""
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocab = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    return Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=131072, extra_special_tokens=list(marks))


def prompt_of(tokenizer: Qwen2Tokenizer) -> str:
    """A prompt with TEXT_TOKENS tokens after the template's prefix is dropped."""
    around = len(tokenizer(TEMPLATE.before + TEMPLATE.after).input_ids)
    return ("a red apple on a yellow table, " * 10)[: TEXT_TOKENS + TEMPLATE.skipped - around]


def build(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Build modules with random weights."""
    torch.manual_seed(0)
    text = Qwen2_5_VLConfig(text_config=scale.text, vision_config=scale.vision)
    with default_dtype(torch.bfloat16), device:
        modules: dict[str, Any] = {
            "text_encoder": Qwen2_5_VLForConditionalGeneration(text),
            "transformer": QwenImageTransformer2DModel(in_channels=64, out_channels=16, **scale.dit),
            "vae": AutoencoderKLQwenImage(**scale.vae),
        }
    for module in modules.values():
        module.requires_grad_(False).eval()
    modules["tokenizer"] = byte_tokenizer()
    modules["scheduler"] = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    return modules


@torch.inference_mode()
def run_diffusers(
    modules: dict[str, Any], scale: Scale, device: torch.device, steps: int
) -> tuple[dict[str, float], Tensor]:
    """Run the reference for warm-up, then timed; returns ms by stage, and the latents."""
    pipeline = QwenImagePipeline(**modules)
    pipeline.set_progress_bar_config(disable=True)
    prompt = prompt_of(modules["tokenizer"])
    spent: dict[str, float] = {}
    for _ in range(2):
        began = now(device)
        embeds, mask = pipeline.encode_prompt(prompt, device=device, max_sequence_length=512)
        encoded = now(device)
        latents = pipeline(
            prompt_embeds=embeds,
            prompt_embeds_mask=mask,
            height=scale.pixels,
            width=scale.pixels,
            num_inference_steps=steps,
            true_cfg_scale=1.0,
            generator=torch.Generator("cpu").manual_seed(SEED),
            output_type="latent",
        ).images
        denoised = now(device)
        raw = pipeline._unpack_latents(latents, scale.pixels, scale.pixels, pipeline.vae_scale_factor)
        shape, config = (1, -1, 1, 1, 1), pipeline.vae.config
        mean, std = (torch.tensor(values).view(shape).to(raw) for values in (config.latents_mean, config.latents_std))
        decoded = pipeline.vae.decode(raw * std + mean, return_dict=False)[0][:, :, 0]
        pipeline.image_processor.postprocess(decoded, output_type="pt").float().cpu()
        times = (encoded - began, denoised - encoded, now(device) - denoised)
        spent = {name: 1e3 * each for name, each in zip(STAGES, times, strict=True)}
    return spent, latents.cpu()


def run_stages(
    modules: dict[str, Any], scale: Scale, device: torch.device, steps: int
) -> tuple[dict[str, float], Tensor]:
    """Run the fleet's stages for warm-up, then timed; returns ms by stage, and the latents.

    Removes the transformer of Diffusers from `modules`.
    """
    transformer, vae = modules.pop("transformer"), modules["vae"]
    config = QwenImagePipelineConfig(
        transformer=QwenImageTransformerConfig.from_dict("transformer", dict(transformer.config)),
        vae=AutoencoderKLQwenImageConfig.from_dict("vae", dict(vae.config)),
        shift=SequenceShift.from_dict("scheduler", SCHEDULER),
    )
    ours = same_weights(config, transformer)
    del transformer  # so that its separate weights are freed when ours are joined
    join_all_weights(ours)
    runtime = Runtime(device=device, dtype=torch.bfloat16)
    language_model = modules["text_encoder"].model.language_model
    language_model.config.use_cache = False
    given = {
        **modules,
        "text_encoder": language_model,
        "transformer": ours,
        "vae": QwenImageVAE(vae),
        "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER),
    }
    stages: dict[str, list[PipelineStage[Any, Any]]] = {
        "text_encoding": [TextEncodingStage(config, runtime, given)],
        "latent_preparation": [
            LatentPreparationStage(config, runtime, {}),
            TimestepPreparationStage(config, runtime, {"scheduler": given["scheduler"]}),
        ],
        "denoising": [DenoisingStage(config, runtime, given)],
        "decoding": [DecodingStage(config, runtime, given)],
    }
    slots: dict[str, Any] = {
        "prompt": Prompt(prompt=prompt_of(modules["tokenizer"])),
        "canvas": Canvas(height=scale.pixels, width=scale.pixels, output_format="safetensors"),
        "sampling": Sampling(num_inference_steps=steps, seed=SEED, true_cfg_scale=1.0),
    }
    spent: dict[str, float] = {}
    for service, each in stages.items():
        hosted = HostedStages(service, each)
        inputs = {name: slots[name] for name in hosted.contract.inputs if name in slots}
        for _ in range(2):
            began = now(device)
            outputs = hosted.run(inputs, Call("bench"))
            spent[service] = 1e3 * (now(device) - began)
        slots |= outputs
    return spent, slots["denoised_latents"].parts["image"].latents


def same_weights(config: QwenImagePipelineConfig, theirs: nn.Module) -> nn.Module:
    """This project's transformer on the reference's tensors."""
    with torch.device("meta"):
        ours = OurTransformer(config.transformer)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.requires_grad_(False).eval()


if __name__ == "__main__":
    main()
