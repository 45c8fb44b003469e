"""Builds small Wan 2.1 and 2.2 checkpoints with random weights: valid Diffusers directories."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from tiny_flux import randomize, t5_tokenizer

LATENT_CHANNELS = 16
TI2V_LATENT_CHANNELS = 48
TEXT_SIZE = 32
IMAGE_SIZE = 24
VISION_TOKENS = 17


def build_tiny_wan(path: Path, *, seed: int = 0) -> Path:
    """Write a text-to-video checkpoint."""
    torch.manual_seed(seed)
    modules = _text_modules() | {"transformer": _transformer(LATENT_CHANNELS), "vae": _vae()}
    _randomize(modules)
    WanPipeline(scheduler=_scheduler(), **modules).save_pretrained(str(path))
    return path


def build_tiny_wan_i2v(path: Path, *, last_image: bool = False, seed: int = 0) -> Path:
    """Write an image-to-video checkpoint, or a checkpoint for first and last frame."""
    torch.manual_seed(seed)
    modules = _text_modules() | {
        "image_encoder": _vision_model(),
        "image_processor": CLIPImageProcessorPil(),
        "transformer": _transformer(
            2 * LATENT_CHANNELS + 4,
            image_dim=IMAGE_SIZE,
            added_kv_proj_dim=4 * 16,
            pos_embed_seq_len=2 * VISION_TOKENS if last_image else None,
        ),
        "vae": _vae(),
    }
    _randomize(modules)
    WanImageToVideoPipeline(scheduler=_scheduler(), **modules).save_pretrained(str(path))
    return path


def build_tiny_wan_a14b(path: Path, *, seed: int = 0) -> Path:
    """Write a text-to-video checkpoint like Wan 2.2 T2V A14B: one expert for high and one for low noise."""
    torch.manual_seed(seed)
    experts = {name: _transformer(LATENT_CHANNELS) for name in ("transformer", "transformer_2")}
    modules = _text_modules() | experts | {"vae": _vae()}
    _randomize(modules)
    WanPipeline(scheduler=_scheduler(), boundary_ratio=0.875, **modules).save_pretrained(str(path))
    return path


def build_tiny_wan_a14b_i2v(path: Path, *, seed: int = 0) -> Path:
    """Write an image-to-video checkpoint like Wan 2.2 I2V A14B: two experts, and no vision encoder."""
    torch.manual_seed(seed)
    experts = {name: _transformer(2 * LATENT_CHANNELS + 4) for name in ("transformer", "transformer_2")}
    modules = _text_modules() | experts | {"vae": _vae(), "image_encoder": None, "image_processor": None}
    _randomize(modules)
    WanImageToVideoPipeline(scheduler=_scheduler(5.0), boundary_ratio=0.9, **modules).save_pretrained(str(path))
    return path


def build_tiny_wan_ti2v(path: Path, *, seed: int = 0) -> Path:
    """Write a checkpoint like Wan 2.2 TI2V-5B. WanPipeline and WanImageToVideoPipeline both load the directory."""
    torch.manual_seed(seed)
    transformer = _transformer(TI2V_LATENT_CHANNELS, TI2V_LATENT_CHANNELS)
    modules = _text_modules() | {"transformer": transformer, "vae": residual_vae()}
    _randomize(modules)
    WanPipeline(scheduler=_scheduler(5.0), expand_timesteps=True, **modules).save_pretrained(str(path))
    return path


def build_tiny_wan_dmd(path: Path, *, seed: int = 0) -> Path:
    """Write a few-step DMD checkpoint with FastVideo's layout."""
    build_tiny_wan(path, seed=seed)
    edit_json(path / "model_index.json", {"_class_name": "WanDMDPipeline"})
    return path


def build_tiny_wan_causal(path: Path, *, seed: int = 0, **causal: int) -> Path:
    """Write a causal few-step checkpoint with blocks of two latent frames; `causal` adds config entries."""
    build_tiny_wan(path, seed=seed)
    edit_json(path / "model_index.json", {"_class_name": "WanCausalDMDPipeline"})
    edit_json(path / "transformer" / "config.json", {"num_frames_per_block": 2, **causal})
    return path


def edit_json(file: Path, entries: Mapping[str, Any]) -> None:
    """Change entries of a JSON object."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def residual_vae() -> AutoencoderKLWan:
    """A VAE like that of Wan 2.2 TI2V-5B, with few channels, and mean and std per latent channel.

    Scale factors equal those of the published VAE. As in the published VAE, encoder and decoder differ in base width.
    """
    channels = range(TI2V_LATENT_CHANNELS)
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=TI2V_LATENT_CHANNELS,
        num_res_blocks=1,
        latents_mean=[0.4 * math.sin(channel) for channel in channels],
        latents_std=[0.5 + 0.3 * math.cos(2 * channel) for channel in channels],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )


def _randomize(modules: dict[str, Any]) -> None:
    for module in modules.values():
        if isinstance(module, nn.Module):
            randomize(module)


def _scheduler(flow_shift: float = 3.0) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


def _text_modules() -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_SIZE,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    return {"tokenizer": tokenizer, "text_encoder": encoder}


def _transformer(in_channels: int, out_channels: int = LATENT_CHANNELS, **image: int | None) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        in_channels=in_channels,
        out_channels=out_channels,
        num_attention_heads=4,
        attention_head_dim=16,
        text_dim=TEXT_SIZE,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
        **image,
    )


def _vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=8, num_res_blocks=1)


def _vision_model() -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=IMAGE_SIZE,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=224,
            patch_size=56,
        )
    )
