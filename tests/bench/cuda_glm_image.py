"""Every stage of GLM-Image on CUDA, next to Diffusers in the same run: random weights of published size, 1024x1024.

Both sides compute with the same weights in memory. Diffusers' pipeline runs first, stage by stage, then the fleet's
stages in this process, without hops (cuda_flux.py has those). Printed are stage times, peak memory beside the weights,
the share of equal prior tokens, and the relative error of the latents from Diffusers' tokens.

Run it with: python tests/bench/cuda_glm_image.py; to try its logic without a card: --device cpu --scale tiny
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_device import empty, now
from bench_report import print_machine, print_table, say
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
from torch import Tensor, nn
from transformers import ByT5Tokenizer, GenerationConfig, T5Config, T5EncoderModel

sys.path.append(str(Path(__file__).parents[1]))  # the builders of small checkpoints

from common.artifacts import Canvas, Conditioning, Prompt, Sampling
from common.local import HostedStages
from common.stage import Call, PipelineStage
from configs.models.dits.glm_image import GlmImageTransformerConfig
from configs.models.vaes.kl import AutoencoderKLConfig
from configs.pipeline_configs.glm_image import GlmImagePipelineConfig
from configs.pipeline_configs.packed import SequenceShift
from models.dits.glm_image import GlmImageTransformer2DModel as OurTransformer
from models.kernels.trials import try_packages
from models.layers.linear import join_all_weights
from models.runtime import Runtime
from models.stages.decoding import DecodingStage
from models.stages.denoising import DenoisingStage
from models.stages.model_specific_stages.glm_image import GlmImageBeforeDenoisingStage
from tiny_glm_image import glm_processor, glm_tokenizer, language_model

SEED = 7
PROMPT = 'a red apple on a yellow table, with a sign that says "old stone river"'
GUIDANCE = 1.5
LATENT_CHANNELS = 16
STAGES = ("before_denoising", "denoising", "decoding")
SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.25,
    "max_shift": 0.75,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "linear",
}


@dataclass(frozen=True)
class Scale:
    """Sizes of the modules, number of image codes, and pixels of a side."""

    dit: dict[str, Any]
    text: dict[str, Any]
    glyphs: dict[str, Any]
    vae: tuple[int, ...]
    codes: int
    pixels: int


SCALES = {
    # A language model of 9 billion parameters without its image encoder, a DiT of 7 billion, ByT5's small encoder.
    "full": Scale(
        dit={"num_attention_heads": 32, "attention_head_dim": 128},
        text={
            "vocab_size": 168064,
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "mrope_section": [8, 12, 12],
            },
        },
        glyphs={"d_model": 1472, "d_kv": 64, "d_ff": 3584, "num_layers": 12, "num_heads": 6},
        vae=(128, 512, 1024, 1024),
        codes=16384,
        pixels=1024,
    ),
    "tiny": Scale(
        dit={
            "num_layers": 2,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "text_embed_dim": 32,
            "time_embed_dim": 32,
            "condition_dim": 16,
        },
        text={},
        glyphs={"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        vae=(8, 8, 16, 16),
        codes=64,
        pixels=128,
    ),
}


@dataclass
class Measured:
    """Milliseconds and peak GB beside the weights, by stage; prior tokens and latents."""

    spent: dict[str, float]
    peaks: dict[str, float]
    tokens: Tensor
    latents: Tensor


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", default="full", choices=tuple(SCALES))
    parser.add_argument("--steps", type=int, default=8, help="steps of the loop")
    args = parser.parse_args()
    device, scale = torch.device(args.device), SCALES[args.scale]
    try_packages(device)
    print_machine(f"GLM-Image on {args.device}, against Diffusers in the same run")
    if device.type == "cuda":
        say(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
        say()
    modules = build(scale, device)
    theirs = run_diffusers(modules, scale, device, args.steps)
    empty(device)
    ours = run_stages(modules, scale, device, args.steps, theirs.tokens)
    say(f"## bfloat16, {scale.pixels}x{scale.pixels}, {args.steps} steps, guidance {GUIDANCE}")
    say()
    header = ("ms", "fleet's stages", "Diffusers", "ratio", "fleet's peak GB", "Diffusers' peak GB")
    rows: list[tuple[object, ...]] = []
    for name in STAGES:
        ratio = f"{ours.spent[name] / theirs.spent[name]:.2f}"
        rows.append((name, ours.spent[name], theirs.spent[name], ratio, ours.peaks[name], theirs.peaks[name]))
    print_table(header, rows)
    equal = float((ours.tokens == theirs.tokens).double().mean())
    error = float((ours.latents.double() - theirs.latents.double()).norm() / theirs.latents.double().norm())
    say(f"Prior tokens: {100 * equal:.1f}% equal")
    say(f"Latents from Diffusers' tokens: relative L2 error {error:.2e}; finite: {bool(ours.latents.isfinite().all())}")


def build(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Modules of random weights in bfloat16."""
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    tokenizer = glm_tokenizer()
    sizes = {"vocab_size": 384, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, **scale.glyphs}
    try:
        with device:
            modules: dict[str, Any] = {
                "text_encoder": T5EncoderModel(T5Config(**sizes, use_cache=False)),
                "vision_language_encoder": language_model(tokenizer, scale.codes, **scale.text),
                "transformer": GlmImageTransformer2DModel(prior_vq_quantizer_codebook_size=scale.codes, **scale.dit),
                "vae": _vae(scale.vae),
            }
    finally:
        torch.set_default_dtype(previous)
    for module in modules.values():
        module.requires_grad_(False).eval()
    modules["vision_language_encoder"].generation_config = GenerationConfig(temperature=0.9, top_p=0.75)
    modules |= {"tokenizer": ByT5Tokenizer(), "processor": glm_processor(tokenizer)}
    return modules | {"scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER)}


def _vae(channels: tuple[int, ...]) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=3 if channels[0] > 8 else 1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=32 if channels[0] > 8 else 4,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def measured(run: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
    """The result of the second call, its milliseconds, and its peak of memory above what was in use, in GB."""
    run()
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    began = now(device)
    result = run()
    spent = 1e3 * (now(device) - began)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    return result, spent, peak / 1e9


@torch.inference_mode()
def run_diffusers(modules: dict[str, Any], scale: Scale, device: torch.device, steps: int) -> Measured:
    """Diffusers' pipeline; its loop encodes the glyphs once more, which takes little."""
    pipeline = GlmImagePipeline(**modules)
    pipeline.set_progress_bar_config(disable=True)
    pixels = scale.pixels

    def before() -> Tensor:
        pipeline.encode_prompt(PROMPT, device=device)
        generator = torch.Generator("cpu").manual_seed(SEED)
        tokens: Tensor = pipeline.generate_prior_tokens(PROMPT, pixels, pixels, device=device, generator=generator)[0]
        return tokens

    def denoise() -> Tensor:
        latents: Tensor = pipeline(
            PROMPT,
            prior_token_ids=tokens,
            height=pixels,
            width=pixels,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(SEED),
            output_type="latent",
        ).images
        return latents

    def decode() -> None:
        decoded = pipeline.vae.decode(latents.to(pipeline.vae.dtype), return_dict=False)[0]
        pipeline.image_processor.postprocess(decoded, output_type="pt").float().cpu()

    spent, peaks = {}, {}
    tokens, spent["before_denoising"], peaks["before_denoising"] = measured(before, device)
    latents, spent["denoising"], peaks["denoising"] = measured(denoise, device)
    _, spent["decoding"], peaks["decoding"] = measured(decode, device)
    return Measured(spent, peaks, tokens.cpu(), latents.cpu())


def run_stages(modules: dict[str, Any], scale: Scale, device: torch.device, steps: int, tokens: Tensor) -> Measured:
    """The fleet's stages; the loop gets these prior tokens, so that its latents can be compared."""
    config = GlmImagePipelineConfig(
        transformer=GlmImageTransformerConfig.from_dict("transformer", dict(modules["transformer"].config)),
        vae=AutoencoderKLConfig.from_dict("vae", dict(modules["vae"].config)),
        latents_mean=(0.0,) * LATENT_CHANNELS,
        latents_std=(1.0,) * LATENT_CHANNELS,
        shift=SequenceShift.from_dict("scheduler", SCHEDULER),
        train_timesteps=1000,
    )
    runtime = Runtime(device=device, dtype=torch.bfloat16)
    given = {
        **modules,
        "transformer": same_weights(config, modules["transformer"]),
        "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER),
    }
    stages: dict[str, PipelineStage[Any, Any]] = {
        "before_denoising": GlmImageBeforeDenoisingStage(config, runtime, given),
        "denoising": DenoisingStage(config, runtime, given),
        "decoding": DecodingStage(config, runtime, given),
    }
    slots: dict[str, Any] = {
        "prompt": Prompt(prompt=PROMPT),
        "canvas": Canvas(height=scale.pixels, width=scale.pixels, output_format="safetensors"),
        "sampling": Sampling(num_inference_steps=steps, seed=SEED, guidance_scale=GUIDANCE),
    }
    spent, peaks = {}, {}
    own = tokens
    for service, stage in stages.items():
        hosted = HostedStages(service, [stage])
        inputs = {name: slots[name] for name in hosted.contract.inputs if name in slots}

        def run(hosted: HostedStages = hosted, inputs: dict[str, Any] = inputs) -> dict[str, Any]:
            return hosted.run(inputs, Call("bench"))

        outputs, spent[service], peaks[service] = measured(run, device)
        slots |= outputs
        if service == "before_denoising":
            own = slots["text_conditioning"].prompt_embeds["prior_token_id"]
            slots["text_conditioning"] = with_tokens(slots["text_conditioning"], tokens)
    return Measured(spent, peaks, own, slots["denoised_latents"].parts["image"].latents)


def with_tokens(conditioning: Conditioning, tokens: Tensor) -> Conditioning:
    """The same glyphs with other prior tokens."""
    prior = {"prior_token_id": tokens}
    return replace(
        conditioning,
        prompt_embeds={**conditioning.prompt_embeds, **prior},
        negative_prompt_embeds={**conditioning.negative_prompt_embeds, **prior},
    )


def same_weights(config: GlmImagePipelineConfig, theirs: nn.Module) -> nn.Module:
    """Our transformer over the reference's own tensors, with its projections joined as the loader joins them."""
    with torch.device("meta"):
        ours = OurTransformer(config.transformer)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    ours.requires_grad_(False).eval()
    join_all_weights(ours)
    return ours


if __name__ == "__main__":
    main()
