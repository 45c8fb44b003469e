"""GLM-Image's modules with random weights, at published size or tiny for a trial run.

Nothing is written or downloaded: weights are drawn on the device, in bfloat16. Published sizes come from the
config.json files of zai-org/GLM-Image; the glyph encoder is ByT5-small.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_works import TINY, WORKS
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImageTransformer2DModel
from torch import nn
from transformers import ByT5Tokenizer, GenerationConfig, T5Config, T5EncoderModel

sys.path.append(str(Path(__file__).parents[1]))  # builders of small checkpoints

from configs.models.dits.glm_image import GlmImageTransformerConfig
from configs.models.vaes.kl import AutoencoderKLConfig
from configs.pipeline_configs.glm_image import GlmImagePipelineConfig
from configs.pipeline_configs.packed import SequenceShift
from models.dits.base import DiffusionTransformer
from models.dits.glm_image import GlmImageTransformer2DModel as OurTransformer
from models.layers.linear import join_all_weights
from tiny_glm_image import glm_processor, glm_tokenizer, language_model

SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.25,
    "max_shift": 0.75,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "linear",
}
LATENTS_MEAN = (
    *(-0.2080078125, 1.875, -0.470703125, -1.265625, -1.421875, 0.77734375, -0.3671875, -0.9453125),
    *(0.318359375, 0.7734375, -0.1884765625, -0.022216796875, -0.220703125, -1.59375, -0.81640625, -0.255859375),
)
LATENTS_STD = (
    *(3.0625, 2.203125, 2.265625, 4.84375, 2.5, 3.9375, 2.203125, 3.03125),
    *(2.1875, 2.046875, 2.71875, 2.390625, 2.390625, 2.453125, 2.25, 2.15625),
)


@dataclass(frozen=True)
class Scale:
    """Module sizes, number of image codes, and image side in pixels."""

    dit: Mapping[str, Any]
    text: dict[str, Any]
    glyphs: dict[str, Any]
    vae: dict[str, Any]
    codes: int
    pixels: int


SCALES = {
    # zai-org/GLM-Image as published, without the language model's image encoder, which text-to-image does not use, and
    # without the 128 special tokens among its 16512 output codes, because a special token would end an image.
    "full": Scale(
        dit=WORKS["glm-image"].sizes,
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
        vae={"block_out_channels": (128, 512, 1024, 1024), "layers_per_block": 3, "norm_num_groups": 32},
        codes=16384,
        pixels=1024,
    ),
    "tiny": Scale(
        dit=TINY[GlmImageTransformer2DModel],
        text={},
        glyphs={"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        vae={"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4},
        codes=256,
        pixels=128,
    ),
}


def build(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Build modules with random bfloat16 weights on the device."""
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    tokenizer = glm_tokenizer()
    glyphs = {"vocab_size": 384, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, **scale.glyphs}
    try:
        with device:
            modules: dict[str, Any] = {
                "text_encoder": T5EncoderModel(T5Config(**glyphs, use_cache=False)),
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


def _vae(sizes: dict[str, Any]) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=len(LATENTS_MEAN),
        latents_mean=LATENTS_MEAN,
        latents_std=LATENTS_STD,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **sizes,
    )


def sizes_of(modules: Mapping[str, Any]) -> str:
    """Format the parameter count of each module, in billions."""
    counts = {
        name: sum(each.numel() for each in module.parameters()) / 1e9
        for name, module in modules.items()
        if isinstance(module, nn.Module)
    }
    return ", ".join(f"{name} {count:.3g} billion" for name, count in counts.items())


def config_of(modules: Mapping[str, Any]) -> GlmImagePipelineConfig:
    """Build the pipeline config from the module configs."""
    return GlmImagePipelineConfig(
        transformer=GlmImageTransformerConfig.from_dict("transformer", dict(modules["transformer"].config)),
        vae=AutoencoderKLConfig.from_dict("vae", dict(modules["vae"].config)),
        latents_mean=LATENTS_MEAN,
        latents_std=LATENTS_STD,
        shift=SequenceShift.from_dict("scheduler", SCHEDULER),
        train_timesteps=1000,
    )


def same_weights(config: GlmImagePipelineConfig, theirs: nn.Module) -> DiffusionTransformer:
    """This project's transformer on the reference's tensors, with projections fused as by the loader."""
    with torch.device("meta"):
        ours = OurTransformer(config.transformer)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    ours.requires_grad_(False).eval()
    join_all_weights(ours)
    return ours
