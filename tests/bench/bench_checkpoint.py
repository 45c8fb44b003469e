"""FLUX.1 with random weights as a Diffusers directory, at published size or tiny for a trial run.

Nothing is downloaded: the tokenizers are copied from the emoji model, whose token ids are valid in all vocabularies.
Weights come from the modules' default initialization, on the device and in the requested dtype. The DiT is written in
shards.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast


@dataclass(frozen=True)
class Scale:
    """Module sizes and a suitable image size."""

    dit: dict[str, Any]
    t5: dict[str, int]
    clip: dict[str, int]
    vae_channels: tuple[int, ...]
    pixels: int
    text_tokens: int
    shard: str


SCALES = {
    # FLUX.1-dev as published: the DiT's defaults with embedded guidance, T5-XXL v1.1, CLIP ViT-L/14, 16-channel VAE.
    "full": Scale(
        dit={"guidance_embeds": True},
        t5={"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128},
        clip={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        vae_channels=(128, 256, 512, 512),
        pixels=1024,
        text_tokens=512,
        shard="5GB",
    ),
    "tiny": Scale(
        dit={
            "guidance_embeds": True,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "axes_dims_rope": (8, 12, 12),
            "joint_attention_dim": 64,
            "pooled_projection_dim": 64,
        },
        t5={"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 32128},
        clip={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        vae_channels=(32, 32, 32, 32),
        pixels=128,
        text_tokens=64,
        shard="1MB",
    ),
}


def build_checkpoint(path: Path, scale: Scale, tokenizers: Path, *, device: torch.device, dtype: torch.dtype) -> None:
    """Write the directory; tokenizers are copied from the Diffusers directory `tokenizers`."""
    torch.manual_seed(0)
    clip_tokenizer = CLIPTokenizer.from_pretrained(tokenizers / "tokenizer")
    clip = CLIPTextConfig(
        **scale.clip,
        projection_dim=scale.clip["hidden_size"],
        vocab_size=49408,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    t5 = T5Config(**scale.t5, num_decoder_layers=0, feed_forward_proj="gated-gelu", is_encoder_decoder=False)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            transformer = FluxTransformer2DModel(**scale.dit)
            vae = _vae(scale)
            text_encoder = CLIPTextModel(clip)
            text_encoder_2 = T5EncoderModel(t5)
    finally:
        torch.set_default_dtype(previous)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
        ),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=T5TokenizerFast.from_pretrained(tokenizers / "tokenizer_2"),
        transformer=transformer,
    )
    pipeline.save_pretrained(path, max_shard_size=scale.shard)


def _vae(scale: Scale) -> AutoencoderKL:
    stages = len(scale.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=scale.vae_channels,
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=32,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def remove_checkpoint(path: Path) -> None:
    """Delete the directory."""
    shutil.rmtree(path, ignore_errors=True)
