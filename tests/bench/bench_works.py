"""Denoisers of published size, each with the inputs of one step: Diffusers' and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel as Flux2Reference
from diffusers import FluxTransformer2DModel as FluxReference
from diffusers import HunyuanVideoTransformer3DModel as HunyuanVideoReference
from diffusers import LTXVideoTransformer3DModel as LtxVideoReference
from diffusers import QwenImageTransformer2DModel as QwenImageReference
from diffusers import WanTransformer3DModel as WanReference
from diffusers import ZImageTransformer2DModel as ZImageReference
from torch import Tensor

from configs.models.dits.flux import FluxTransformerConfig
from configs.models.dits.flux2 import Flux2TransformerConfig
from configs.models.dits.hunyuan_video import HunyuanVideoTransformerConfig
from configs.models.dits.ltx_video import LTXVideoTransformerConfig
from configs.models.dits.qwen_image import QwenImageTransformerConfig
from configs.models.dits.wan import WanTransformerConfig
from configs.models.dits.z_image import ZImageTransformerConfig
from models.dits.base import DiffusionTransformer
from models.dits.flux import FluxTransformer2DModel
from models.dits.flux2 import Flux2Transformer2DModel
from models.dits.flux2_plan import FLUX2_PLAN
from models.dits.flux_plan import FLUX_PLAN
from models.dits.hunyuan_video import HunyuanVideoTransformer3DModel
from models.dits.hunyuan_video_plan import HUNYUAN_VIDEO_PLAN
from models.dits.ltx_video import LTXVideoTransformer3DModel
from models.dits.ltx_video_plan import LTX_VIDEO_PLAN
from models.dits.qwen_image import QwenImageTransformer2DModel
from models.dits.qwen_image_plan import QWEN_IMAGE_PLAN
from models.dits.wan import WanTransformer3DModel
from models.dits.wan_plan import WAN_PLAN
from models.dits.z_image import ZImageTransformer2DModel
from models.dits.z_image_plan import Z_IMAGE_PLAN
from models.parallel.plan import ParallelPlan

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A model of one size, and the inputs of one step: theirs and ours, by the names of forward().

    `heads` is the entry of the reference's configuration with the number of heads.
    """

    title: str
    reference: type[Any]
    sizes: Mapping[str, Any]
    ours: Callable[[Any], DiffusionTransformer]
    inputs: Callable[[bool], tuple[Inputs, Inputs]]
    plan: ParallelPlan
    goal_ms: float = 0.0
    heads: str = "num_attention_heads"


class StackedZImage(ZImageReference):  # type: ignore[misc]
    """Diffusers' model, which takes a list of images and one of texts, on tensors."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Predictions (B, C, rows, columns)."""
        del return_dict
        images = list(hidden_states[:, :, None])
        (made,) = super().forward(images, timestep, list(encoder_hidden_states), return_dict=False)
        return (torch.stack(made)[:, :, 0],)


def _flux_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    rows, text, width, pooled, channels = (4, 6, 32, 24, 64) if tiny else (64, 512, 4096, 768, 64)
    shared: Inputs = {
        "hidden_states": _normal(1, rows * rows, channels),
        "encoder_hidden_states": _normal(1, text, width),
        "pooled_projections": _normal(1, pooled),
        "timestep": torch.tensor([0.75]),
        "guidance": torch.tensor([3.5]),
        "txt_ids": torch.zeros(text, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(rows))),
    }
    return dict(shared), shared


def _qwen_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    rows, text, width, channels = (4, 6, 24, 64) if tiny else (64, 200, 3584, 64)
    shared: Inputs = {
        "hidden_states": _normal(1, rows * rows, channels),
        "encoder_hidden_states": _normal(1, text, width),
        "timestep": torch.tensor([0.75]),
    }
    down = torch.arange(float(rows)) - rows // 2
    positions: Inputs = {
        "img_ids": torch.cartesian_prod(torch.zeros(1), down, down),
        "txt_ids": (torch.arange(float(text)) + rows // 2)[:, None].expand(-1, 3),
    }
    return {**shared, "img_shapes": [[(1, rows, rows)]]}, {**shared, **positions}


def _wan_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    frames, rows, columns, text, width = (2, 4, 4, 512, 16) if tiny else (21, 60, 104, 512, 4096)
    shared: Inputs = {
        "hidden_states": _normal(1, 16, frames, rows, columns),
        "timestep": torch.tensor([750]),
        "encoder_hidden_states": _normal(1, text, width),
    }
    return dict(shared), shared


def _z_image_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    rows, text, width = (4, 32, 24) if tiny else (64, 224, 2560)
    shared: Inputs = {
        "hidden_states": _normal(1, 16, 2 * rows, 2 * rows),
        "timestep": torch.tensor([0.25]),
        "encoder_hidden_states": _normal(1, text, width),
    }
    side = torch.arange(rows)
    image_ids = torch.cartesian_prod(torch.tensor([text + 1]), side, side)
    padded = torch.nn.functional.pad(image_ids, (0, 0, 0, -rows * rows % 32))
    text_ids = torch.nn.functional.pad(1 + torch.arange(text)[:, None], (0, 2))
    return dict(shared), {**shared, "text_ids": text_ids, "image_ids": padded}


def _hunyuan_video_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    """The reference's text is padded to 256 tokens."""
    sizes, text, width, pooled = ((2, 2, 2), 6, 24, 12) if tiny else ((16, 30, 52), 200, 4096, 768)
    frames, rows, columns = sizes
    shared: Inputs = {
        "hidden_states": _normal(1, 16, frames, 2 * rows, 2 * columns),
        "timestep": torch.tensor([750.0]),
        "encoder_hidden_states": _normal(1, text, width),
        "pooled_projections": _normal(1, pooled),
    }
    theirs: Inputs = {
        **shared,
        "encoder_hidden_states": torch.nn.functional.pad(shared["encoder_hidden_states"], (0, 0, 0, 256 - text)),
        "encoder_attention_mask": (torch.arange(256) < text)[None].bfloat16(),
        "guidance": torch.tensor([6000.0]),
    }
    video_ids = torch.cartesian_prod(*map(torch.arange, sizes))
    return theirs, {**shared, "guidance": torch.tensor([6.0]), "video_ids": video_ids}


def _ltx_video_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    """The reference's text is padded to 128 tokens."""
    sizes, text, width = ((2, 2, 2), 6, 24) if tiny else ((21, 16, 24), 60, 4096)
    frames, rows, columns = sizes
    scale = (8 / 25, 32, 32)
    axes = (torch.arange(float(size)) * unit for size, unit in zip(sizes, scale, strict=True))
    shared: Inputs = {
        "hidden_states": _normal(1, frames * rows * columns, 128),
        "timestep": torch.tensor([750.0]),
        "encoder_hidden_states": _normal(1, text, width),
    }
    theirs: Inputs = {
        **shared,
        "encoder_hidden_states": torch.nn.functional.pad(shared["encoder_hidden_states"], (0, 0, 0, 128 - text)),
        "encoder_attention_mask": (torch.arange(128) < text)[None].bfloat16(),
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "rope_interpolation_scale": scale,
    }
    return theirs, {**shared, "positions": torch.cartesian_prod(*axes)}


def _klein_inputs(tiny: bool) -> tuple[Inputs, Inputs]:
    rows, text, width = (4, 6, 24) if tiny else (64, 512, 7680)
    side = torch.arange(float(rows))
    zero = torch.zeros(1)
    shared: Inputs = {
        "hidden_states": _normal(1, rows * rows, 128),
        "encoder_hidden_states": _normal(1, text, width),
        "timestep": torch.tensor([0.75]),
        "guidance": None,
        "img_ids": torch.cartesian_prod(zero, side, side, zero),
        "txt_ids": torch.nn.functional.pad(torch.arange(float(text))[:, None], (3, 0)),
    }
    return dict(shared), shared


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


WORKS = {
    "flux": Work(
        "FLUX.1-dev 1024x1024, 512 text tokens",
        FluxReference,
        {"guidance_embeds": True},
        lambda config: FluxTransformer2DModel(FluxTransformerConfig.from_dict("transformer", config)),
        _flux_inputs,
        FLUX_PLAN,
        112,
    ),
    "wan": Work(
        "Wan2.1-1.3B 480x832, 81 frames, no guidance",
        WanReference,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096},
        lambda config: WanTransformer3DModel(WanTransformerConfig.from_dict("transformer", config)),
        _wan_inputs,
        WAN_PLAN,
        440,
    ),
    "qwen": Work(
        "Qwen-Image 1024x1024, 200 text tokens",
        QwenImageReference,
        {"in_channels": 64, "out_channels": 16},
        lambda config: QwenImageTransformer2DModel(QwenImageTransformerConfig.from_dict("transformer", config)),
        _qwen_inputs,
        QWEN_IMAGE_PLAN,
        115,
    ),
    "wan-14b": Work(
        "Wan2.1-14B and one expert of Wan2.2-A14B 480x832, 81 frames, no guidance",
        WanReference,
        {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "text_dim": 4096},
        lambda config: WanTransformer3DModel(WanTransformerConfig.from_dict("transformer", config)),
        _wan_inputs,
        WAN_PLAN,
    ),
    "hunyuan-video": Work(
        "HunyuanVideo 480x832, 61 frames, 200 text tokens",
        HunyuanVideoReference,
        {},
        lambda config: HunyuanVideoTransformer3DModel(HunyuanVideoTransformerConfig.from_dict("transformer", config)),
        _hunyuan_video_inputs,
        HUNYUAN_VIDEO_PLAN,
    ),
    "z-image": Work(
        "Z-Image 1024x1024, 224 text tokens, no guidance",
        StackedZImage,
        {},
        lambda config: ZImageTransformer2DModel(ZImageTransformerConfig.from_dict("transformer", config)),
        _z_image_inputs,
        Z_IMAGE_PLAN,
        heads="n_heads",
    ),
    "ltx-video": Work(
        "LTX-Video 2B 512x768, 161 frames, 60 text tokens, no guidance",
        LtxVideoReference,
        {},
        lambda config: LTXVideoTransformer3DModel(LTXVideoTransformerConfig.from_dict("transformer", config)),
        _ltx_video_inputs,
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
        lambda config: Flux2Transformer2DModel(Flux2TransformerConfig.from_dict("transformer", config)),
        _klein_inputs,
        FLUX2_PLAN,
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
