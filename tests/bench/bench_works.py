"""Workloads: denoisers of published size with inputs of one step, for Diffusers and this project."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench_inputs import (
    Inputs,
    causal_wan_inputs,
    flux2_inputs,
    flux_inputs,
    glm_image_inputs,
    hunyuan_video_inputs,
    klein_inputs,
    ltx2_inputs,
    ltx2_tokens,
    ltx_video_inputs,
    qwen_edit_inputs,
    qwen_inputs,
    qwen_layered_inputs,
    wan_inputs,
    wan_ti2v_inputs,
    z_image_inputs,
)
from bench_references import ConditionedQwenImage, StackedZImage
from bench_steps import HIDDEN_STATES
from diffusers import Flux2Transformer2DModel as Flux2Reference
from diffusers import FluxTransformer2DModel as FluxReference
from diffusers import GlmImageTransformer2DModel as GlmImageReference
from diffusers import HunyuanVideoTransformer3DModel as HunyuanVideoReference
from diffusers import LTX2VideoTransformer3DModel as Ltx2Reference
from diffusers import LTXVideoTransformer3DModel as LtxVideoReference
from diffusers import QwenImageTransformer2DModel as QwenImageReference
from diffusers import WanTransformer3DModel as WanReference
from torch import Tensor

from configs.models.dits.causal_wan import CausalWanTransformerConfig
from configs.models.dits.flux import FluxTransformerConfig
from configs.models.dits.flux2 import Flux2TransformerConfig
from configs.models.dits.glm_image import GlmImageTransformerConfig
from configs.models.dits.hunyuan_video import HunyuanVideoTransformerConfig
from configs.models.dits.ltx2 import LTX2TransformerConfig
from configs.models.dits.ltx_video import LTXVideoTransformerConfig
from configs.models.dits.qwen_image import QwenImageTransformerConfig
from configs.models.dits.wan import WanTransformerConfig
from configs.models.dits.z_image import ZImageTransformerConfig
from models.dits.base import DiffusionTransformer, Predictions
from models.dits.causal_wan import CausalWanTransformer3DModel
from models.dits.flux import FluxTransformer2DModel
from models.dits.flux2 import Flux2Transformer2DModel
from models.dits.flux2_plan import FLUX2_PLAN
from models.dits.flux_plan import FLUX_PLAN
from models.dits.glm_image import GlmImageTransformer2DModel
from models.dits.glm_image_plan import GLM_IMAGE_PLAN
from models.dits.hunyuan_video import HunyuanVideoTransformer3DModel
from models.dits.hunyuan_video_plan import HUNYUAN_VIDEO_PLAN
from models.dits.ltx2 import LTX2VideoTransformer3DModel
from models.dits.ltx2_plan import LTX2_PLAN
from models.dits.ltx_video import LTXVideoTransformer3DModel
from models.dits.ltx_video_plan import LTX_VIDEO_PLAN
from models.dits.qwen_image import QwenImageTransformer2DModel
from models.dits.qwen_image_plan import QWEN_IMAGE_PLAN
from models.dits.wan import WanTransformer3DModel
from models.dits.wan_plan import WAN_PLAN
from models.dits.z_image import ZImageTransformer2DModel
from models.dits.z_image_plan import Z_IMAGE_PLAN

if TYPE_CHECKING:
    # For typing only: step_pairs.py runs this module with checkouts whose parallel plans are in another module.
    from models.parallel.plan import ParallelPlan


def _in_order(predictions: Predictions) -> tuple[Tensor, ...]:
    return tuple(predictions.values())


@dataclass(frozen=True)
class Work:
    """A model of one size, and the inputs of one step for Diffusers' forward() and ours.

    `heads` is the reference's config entry with the number of heads. `latents` are our inputs that every step receives
    as latents, including those of input images. `parts` converts our predictions to the tuple that the reference
    returns. `goal_ms` is the target time of our step on an H100; 0 without a target.
    """

    title: str
    reference: type[Any]
    sizes: Mapping[str, Any]
    ours: Callable[[Any], DiffusionTransformer]
    inputs: Callable[[bool], tuple[Inputs, Inputs]]
    plan: ParallelPlan
    goal_ms: float = 0.0
    heads: str = "num_attention_heads"
    latents: tuple[str, ...] = (HIDDEN_STATES,)
    parts: Callable[[Predictions], tuple[Tensor, ...]] = _in_order


def _causal_wan(config: Mapping[str, Any]) -> DiffusionTransformer:
    causal = {"num_frames_per_block": 3, **config}
    return CausalWanTransformer3DModel(CausalWanTransformerConfig.from_dict("transformer", causal))


def _flux(config: Mapping[str, Any]) -> DiffusionTransformer:
    return FluxTransformer2DModel(FluxTransformerConfig.from_dict("transformer", config))


def _flux2(config: Mapping[str, Any]) -> DiffusionTransformer:
    return Flux2Transformer2DModel(Flux2TransformerConfig.from_dict("transformer", config))


def _glm_image(config: Mapping[str, Any]) -> DiffusionTransformer:
    return GlmImageTransformer2DModel(GlmImageTransformerConfig.from_dict("transformer", config))


def _hunyuan_video(config: Mapping[str, Any]) -> DiffusionTransformer:
    return HunyuanVideoTransformer3DModel(HunyuanVideoTransformerConfig.from_dict("transformer", config))


def _ltx2(config: Mapping[str, Any]) -> DiffusionTransformer:
    return LTX2VideoTransformer3DModel(LTX2TransformerConfig.from_dict("transformer", config))


def _ltx_video(config: Mapping[str, Any]) -> DiffusionTransformer:
    return LTXVideoTransformer3DModel(LTXVideoTransformerConfig.from_dict("transformer", config))


def _qwen(config: Mapping[str, Any]) -> DiffusionTransformer:
    return QwenImageTransformer2DModel(QwenImageTransformerConfig.from_dict("transformer", config))


def _wan(config: Mapping[str, Any]) -> DiffusionTransformer:
    return WanTransformer3DModel(WanTransformerConfig.from_dict("transformer", config))


def _z_image(config: Mapping[str, Any]) -> DiffusionTransformer:
    return ZImageTransformer2DModel(ZImageTransformerConfig.from_dict("transformer", config))


WORKS = {
    "flux": Work(
        "FLUX.1-dev 1024x1024, 512 text tokens",
        FluxReference,
        {"guidance_embeds": True},
        _flux,
        flux_inputs,
        FLUX_PLAN,
        112,
    ),
    "wan": Work(
        "Wan2.1-1.3B 480x832, 81 frames, no guidance",
        WanReference,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096},
        _wan,
        wan_inputs,
        WAN_PLAN,
        440,
    ),
    "qwen": Work(
        "Qwen-Image 1024x1024, 200 text tokens",
        QwenImageReference,
        {"in_channels": 64, "out_channels": 16},
        _qwen,
        qwen_inputs,
        QWEN_IMAGE_PLAN,
        115,
    ),
    "wan-14b": Work(
        "Wan2.1-14B and one expert of Wan2.2-A14B 480x832, 81 frames, no guidance",
        WanReference,
        {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "text_dim": 4096},
        _wan,
        wan_inputs,
        WAN_PLAN,
    ),
    "hunyuan-video": Work(
        "HunyuanVideo 480x832, 61 frames, 200 text tokens",
        HunyuanVideoReference,
        {},
        _hunyuan_video,
        hunyuan_video_inputs,
        HUNYUAN_VIDEO_PLAN,
    ),
    "z-image": Work(
        "Z-Image 1024x1024, 224 text tokens, no guidance",
        StackedZImage,
        {},
        _z_image,
        z_image_inputs,
        Z_IMAGE_PLAN,
        heads="n_heads",
    ),
    "ltx-video": Work(
        "LTX-Video 2B 512x768, 161 frames, 60 text tokens, no guidance",
        LtxVideoReference,
        {},
        _ltx_video,
        ltx_video_inputs,
        LTX_VIDEO_PLAN,
    ),
    "klein": Work(
        "FLUX.2-klein-4B 1024x1024, 512 text tokens",
        Flux2Reference,
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        _flux2,
        klein_inputs,
        FLUX2_PLAN,
    ),
    "flux2-dev": Work(
        "FLUX.2-dev 1024x1024, 512 text tokens, half of its layers (4 and 24)",
        Flux2Reference,
        {"num_layers": 4, "num_single_layers": 24},
        _flux2,
        flux2_inputs,
        FLUX2_PLAN,
    ),
    "qwen-edit-plus": Work(
        "Qwen-Image-Edit-Plus 2511 1024x1024, two input images, 200 text tokens",
        ConditionedQwenImage,
        {"in_channels": 64, "out_channels": 16, "zero_cond_t": True},
        _qwen,
        qwen_edit_inputs,
        QWEN_IMAGE_PLAN,
        latents=(HIDDEN_STATES, "condition_states"),
    ),
    "qwen-layered": Work(
        "Qwen-Image-Layered 640x640, four layers, 200 text tokens",
        ConditionedQwenImage,
        {"in_channels": 64, "out_channels": 16, "use_additional_t_cond": True, "use_layer3d_rope": True},
        _qwen,
        qwen_layered_inputs,
        QWEN_IMAGE_PLAN,
        latents=(HIDDEN_STATES, "condition_states"),
    ),
    "wan-ti2v": Work(
        "Wan2.2-TI2V-5B 704x1280, 121 frames, an input first frame, no guidance",
        WanReference,
        {
            "num_attention_heads": 24,
            "in_channels": 48,
            "out_channels": 48,
            "ffn_dim": 14336,
            "num_layers": 30,
            "text_dim": 4096,
        },
        _wan,
        wan_ti2v_inputs,
        WAN_PLAN,
    ),
    "causal-wan": Work(
        "Causal Wan2.1-1.3B 480x832, the first block (3 latent frames) of 81 frames",
        WanReference,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096},
        _causal_wan,
        causal_wan_inputs,
        WAN_PLAN,
    ),
    "glm-image": Work(
        "GLM-Image 1024x1024, 64 glyph tokens, no guidance",
        GlmImageReference,
        {"num_attention_heads": 32, "attention_head_dim": 128},
        _glm_image,
        glm_image_inputs,
        GLM_IMAGE_PLAN,
    ),
    "ltx2": Work(
        "LTX-2 512x768, 121 frames with audio, 1024 text tokens, no guidance",
        Ltx2Reference,
        {"rope_type": "split"},
        _ltx2,
        ltx2_inputs,
        LTX2_PLAN,
        latents=(HIDDEN_STATES, "audio_hidden_states"),
        parts=ltx2_tokens,
    ),
}

_SMALL_HEADS = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "axes_dims_rope": (4, 6, 6)}
TINY: Mapping[type[Any], Mapping[str, Any]] = {
    FluxReference: {
        **_SMALL_HEADS,
        "num_single_layers": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 24,
    },
    QwenImageReference: {**_SMALL_HEADS, "joint_attention_dim": 24},
    ConditionedQwenImage: {**_SMALL_HEADS, "joint_attention_dim": 24},
    GlmImageReference: {
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "text_embed_dim": 32,
        "time_embed_dim": 32,
        "condition_dim": 16,
    },
    Ltx2Reference: {
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "cross_attention_dim": 64,
        "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 32,
        "caption_channels": 24,
    },
    WanReference: {
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "text_dim": 16,
    },
    StackedZImage: {
        "dim": 48,
        "n_layers": 2,
        "n_refiner_layers": 2,
        "n_heads": 3,
        "n_kv_heads": 3,
        "cap_feat_dim": 24,
        "axes_dims": [4, 6, 6],
    },
    HunyuanVideoReference: {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "text_embed_dim": 24,
        "pooled_projection_dim": 12,
        "rope_axes_dim": (4, 6, 6),
    },
    LtxVideoReference: {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
        "num_layers": 2,
        "caption_channels": 24,
    },
    Flux2Reference: {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 4, 4, 4),
    },
}
