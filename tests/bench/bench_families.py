"""Model families for cuda_stages.py: modules of published size with random weights, and one request.

Sizes are the published ones; arguments equal to a Diffusers default are omitted. Tokenizers and schedulers come from
the small checkpoints, whose vocabularies are smaller than the encoders' embeddings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from bench_device import default_dtype
from bench_works import WORKS
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    QwenImageEditPlusPipeline,
    QwenImageLayeredPipeline,
    QwenImageTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

sys.path.append(str(Path(__file__).parents[1]))  # builders of small checkpoints

from tiny_flux2 import build_tiny_flux2_dev, build_tiny_flux2_klein, open_flux2_reference
from tiny_hunyuan_video import build_tiny_hunyuan_video
from tiny_ltx_video import build_tiny_ltx_video_095, vae_sizes
from tiny_qwen_image import (
    build_tiny_qwen_image_edit_plus,
    build_tiny_qwen_image_layered,
    open_edit_plus_reference,
    open_layered_reference,
    qwen_tokenizer,
)
from tiny_wan import build_tiny_wan_a14b
from tiny_z_image import build_tiny_z_image

Modules = dict[str, nn.Module]
Request = Mapping[str, Any]
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Family:
    """A published model with its Diffusers pipeline, modules and request.

    Request parameters have the same names on both sides. `build_tiny` writes a small checkpoint, `open_tiny` opens it
    in bfloat16. `modules` builds the modules at published size. `index` adds entries to model_index.json. For the
    small checkpoint, `small` overrides request parameters. `image_modes` are Pillow modes, one per input image.
    """

    title: str
    pipeline: type[Any]
    build_tiny: Callable[[Path], Path]
    modules: Callable[[], Modules]
    part: str
    request: Request
    small: Request
    index: Request = field(default_factory=dict)
    open_tiny: Callable[[Path], Any] | None = None
    image_modes: Sequence[Literal["RGB", "RGBA"]] = ()

    def open_small(self, directory: Path) -> Any:
        """Open the small checkpoint in bfloat16 as a Diffusers pipeline."""
        if self.open_tiny is not None:
            return self.open_tiny(directory)
        return self.pipeline.from_pretrained(directory, dtype=DTYPE)

    def published_modules(self, device: torch.device) -> Modules:
        """Build modules with random weights on the device: bfloat16, or float32 where the model requires it."""
        torch.manual_seed(0)
        with default_dtype(DTYPE), device:
            modules = self.modules()
        for module in modules.values():
            _keep_float32(module)
        return modules


def _keep_float32(module: Any) -> None:
    """Convert the parameters that from_pretrained() loads in float32."""
    names = (module._keep_in_fp32_modules or ()) if "diffusers" in type(module).__module__ else ()
    for path, parameter in module.named_parameters():
        if set(path.split(".")) & set(names):
            parameter.data = parameter.data.float()


_QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
_LLAMA_3_8B = {
    "vocab_size": 128320,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
_CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
}
_MISTRAL_SMALL_24B = {
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
        "sliding_window": None,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
        "patch_size": 14,
        "image_size": 1540,
    },
    "image_token_index": 10,
    "tie_word_embeddings": False,
}
_QWEN_VL_7B = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "tokens_per_second": 2,
    },
}
_QWEN_VL_PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
"""Bounds of the published image processor."""
_FLUX_VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_LTX_VAE_095: Mapping[str, Any] = {
    **vae_sizes("0.9.5"),
    "latent_channels": 128,
    "block_out_channels": (128, 256, 512, 1024, 2048),
    "decoder_block_out_channels": (256, 512, 1024),
    "layers_per_block": (4, 6, 6, 2, 2),
    "decoder_layers_per_block": (5, 5, 5, 5),
}


def _z_image() -> Modules:
    return {
        "text_encoder": Qwen3Model(Qwen3Config(**_QWEN3_4B)),
        "transformer": ZImageTransformer2DModel(**WORKS["z-image"].sizes),
        "vae": AutoencoderKL(**_FLUX_VAE),
    }


def _klein() -> Modules:
    return {
        "text_encoder": Qwen3ForCausalLM(Qwen3Config(**_QWEN3_4B)),
        "transformer": Flux2Transformer2DModel(**WORKS["klein"].sizes),
        "vae": AutoencoderKLFlux2(),
    }


def _flux2_dev() -> Modules:
    return {
        "text_encoder": Mistral3ForConditionalGeneration(Mistral3Config(**_MISTRAL_SMALL_24B)),
        "transformer": Flux2Transformer2DModel(),
        "vae": AutoencoderKLFlux2(),
    }


def _hunyuan_video() -> Modules:
    return {
        "text_encoder": LlamaModel(LlamaConfig(**_LLAMA_3_8B)),
        "text_encoder_2": CLIPTextModel(CLIPTextConfig(**_CLIP_L)),
        "transformer": HunyuanVideoTransformer3DModel(**WORKS["hunyuan-video"].sizes),
        "vae": AutoencoderKLHunyuanVideo(),
    }


def _ltx_video() -> Modules:
    modules: Modules = {
        "text_encoder": T5EncoderModel(T5Config(vocab_size=32128, **_T5_XXL)),
        "transformer": LTXVideoTransformer3DModel(**WORKS["ltx-video"].sizes),
    }
    vae = AutoencoderKLLTXVideo(**_LTX_VAE_095)
    vae.decoder.timestep_scale_multiplier.data.fill_(1000.0)
    return {**modules, "vae": vae}


def _wan_a14b() -> Modules:
    return {
        "text_encoder": UMT5EncoderModel(UMT5Config(vocab_size=256384, **_T5_XXL)),
        "transformer": WanTransformer3DModel(**WORKS["wan-14b"].sizes),
        "transformer_2": WanTransformer3DModel(**WORKS["wan-14b"].sizes),
        "vae": AutoencoderKLWan(),
    }


def _qwen_vl() -> nn.Module:
    """The published encoder, with the image token ids of the small checkpoints' tokenizer."""
    marks = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
    names = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(names, qwen_tokenizer().convert_tokens_to_ids(marks), strict=True))
    encoder: nn.Module = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_QWEN_VL_7B, **ids))
    return encoder


def _qwen_image(flags: Mapping[str, bool], channels: int) -> Modules:
    return {
        "text_encoder": _qwen_vl(),
        "transformer": QwenImageTransformer2DModel(**WORKS["qwen"].sizes, **flags),
        "vae": AutoencoderKLQwenImage(input_channels=channels),
    }


def _with_published_processor(build: Callable[[Path], Path], directory: Path) -> Path:
    """A small checkpoint whose encoder uses the published number of image tokens."""
    built = build(directory)
    Qwen2VLImageProcessorPil(size=_QWEN_VL_PIXELS).save_pretrained(built / "processor")
    return built


def _open_in_bfloat16(open_reference: Callable[[Path], Any], directory: Path) -> Any:
    pipeline = open_reference(directory)
    for name in ("text_encoder", "transformer", "vae"):
        pipeline.components[name].to(DTYPE)
    return pipeline


_LARGE_IMAGE: Request = {"height": 1024, "width": 1024}
_SMALL_IMAGE: Request = {"height": 64, "width": 64}
# Negative prompt of the published examples.
_TRUE_GUIDANCE: Request = {"negative_prompt": " ", "true_cfg_scale": 4.0}
FAMILIES = {
    "z-image": Family(
        "Z-Image-Turbo: 6B transformer, Qwen3-4B; no guidance",
        ZImagePipeline,
        build_tiny_z_image,
        _z_image,
        "image",
        {**_LARGE_IMAGE, "guidance_scale": 0.0},
        _SMALL_IMAGE,
    ),
    "klein": Family(
        "FLUX.2-klein-4B: 5 + 20 layers, Qwen3-4B; distilled, no guidance",
        Flux2KleinPipeline,
        partial(build_tiny_flux2_klein, is_distilled=True),
        _klein,
        "image",
        {**_LARGE_IMAGE, "guidance_scale": 1.0},
        _SMALL_IMAGE,
        index={"is_distilled": True},
    ),
    "hunyuan-video": Family(
        "HunyuanVideo: 13B transformer, Llama-3-8B, CLIP-L; embedded guidance",
        HunyuanVideoPipeline,
        build_tiny_hunyuan_video,
        _hunyuan_video,
        "video",
        {"height": 480, "width": 832, "num_frames": 61},
        {"height": 32, "width": 48, "num_frames": 9},
    ),
    "ltx-video": Family(
        "LTX-Video 2B 0.9.5: T5-XXL; two guidance branches, a denoising decoder",
        LTXPipeline,
        build_tiny_ltx_video_095,
        _ltx_video,
        "video",
        {"height": 512, "width": 768, "num_frames": 161, "decode_timestep": 0.05, "decode_noise_scale": 0.025},
        {"height": 64, "width": 96, "num_frames": 9},
    ),
    "wan-a14b": Family(
        "Wan 2.2 T2V A14B: two experts of 40 layers, UMT5-XXL; two guidance branches",
        WanPipeline,
        build_tiny_wan_a14b,
        _wan_a14b,
        "video",
        {"height": 480, "width": 832, "num_frames": 81, "guidance_scale": 4.0, "guidance_scale_2": 3.0},
        {"height": 32, "width": 48, "num_frames": 9},
        index={"boundary_ratio": 0.875},
    ),
    "flux2-dev": Family(
        "FLUX.2-dev: all 8 + 48 layers, all 40 layers of Mistral-Small-24B; embedded guidance",
        Flux2Pipeline,
        build_tiny_flux2_dev,
        _flux2_dev,
        "image",
        {**_LARGE_IMAGE, "guidance_scale": 4.0},
        _SMALL_IMAGE,
        open_tiny=partial(_open_in_bfloat16, open_flux2_reference),
    ),
    "qwen-image-edit-plus": Family(
        "Qwen-Image-Edit-Plus 2511: 20B transformer, Qwen2.5-VL-7B, two input images; two guidance branches",
        QwenImageEditPlusPipeline,
        partial(_with_published_processor, build_tiny_qwen_image_edit_plus),
        partial(_qwen_image, {"zero_cond_t": True}, 3),
        "image",
        {**_LARGE_IMAGE, **_TRUE_GUIDANCE},
        _SMALL_IMAGE,
        open_tiny=partial(_open_in_bfloat16, open_edit_plus_reference),
        image_modes=("RGB", "RGB"),
    ),
    "qwen-image-layered": Family(
        "Qwen-Image-Layered: 20B transformer, Qwen2.5-VL-7B, four layers with transparency; two guidance branches",
        QwenImageLayeredPipeline,
        partial(_with_published_processor, build_tiny_qwen_image_layered),
        partial(_qwen_image, {"use_additional_t_cond": True, "use_layer3d_rope": True}, 4),
        "image",
        {**_TRUE_GUIDANCE, "layers": 4, "resolution": 640, "cfg_normalize": True},
        {"layers": 2},
        open_tiny=partial(_open_in_bfloat16, open_layered_reference),
        image_modes=("RGBA",),
    ),
}
