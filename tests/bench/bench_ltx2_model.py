"""LTX-2 with random weights in memory for both sides, at published size or tiny for a trial run.

Sizes are those of Lightricks/LTX-2 and Lightricks/LTX-2.3 after Diffusers' conversion, and of google/gemma-3-12b-it.
Nothing is downloaded. At published size, nothing is written: weights are drawn on the device and stored in bfloat16.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_device import default_dtype
from bench_works import WORKS
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

sys.path.append(str(Path(__file__).parents[1]))  # builders of small checkpoints

from common.pipeline import ServiceSpec
from configs.models.dits.ltx2 import LTX2TransformerConfig
from configs.models.ltx2_connectors import LTX2ConnectorsConfig
from configs.models.vaes.ltx2 import LTX2AudioVAEConfig, LTX2VideoVAEConfig, LTX2VocoderConfig
from configs.pipeline_configs.ltx2 import LTX2PipelineConfig
from configs.pipeline_configs.packed import SequenceShift
from models.dits.ltx2 import LTX2VideoTransformer3DModel as OurTransformer
from models.layers.linear import join_all_weights
from models.registry import resolve
from models.runtime import Runtime
from models.vaes.ltx2 import LTX2AudioVAE, LTX2VideoVAE
from tiny_ltx2 import build_tiny_ltx2, gemma_tokenizer

Sizes = Mapping[str, Any]
Modules = dict[str, Any]

SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
_GEMMA_3_12B = {
    "text_config": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "sliding_window": 1024,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
    },
}


@dataclass(frozen=True)
class Version:
    """Module arguments of one published version that differ from the defaults of Diffusers' classes.

    `tiny` is the version of the small checkpoint.
    """

    tiny: str
    transformer: Sizes
    connectors: Sizes
    vae: Sizes
    vocoder: type[nn.Module]


VERSIONS = {
    "ltx-2": Version(
        tiny="2.0",
        transformer=WORKS["ltx2"].sizes,
        connectors={"rope_type": "split"},
        vae={"decoder_causal": False, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
        vocoder=LTX2Vocoder,
    ),
    "ltx-2.3": Version(
        tiny="2.3",
        transformer={
            **WORKS["ltx2"].sizes,
            "gated_attn": True,
            "cross_attn_mod": True,
            "audio_gated_attn": True,
            "audio_cross_attn_mod": True,
            "use_prompt_embeddings": False,
            "perturbed_attn": True,
        },
        connectors={
            "rope_type": "split",
            "per_modality_projections": True,
            "proj_bias": True,
            "video_connector_num_attention_heads": 32,
            "video_connector_num_layers": 8,
            "video_gated_attn": True,
            "audio_connector_num_attention_heads": 32,
            "audio_connector_attention_head_dim": 64,
            "audio_connector_num_layers": 8,
            "audio_gated_attn": True,
        },
        vae={
            "decoder_causal": False,
            "block_out_channels": (256, 512, 1024, 1024),
            "decoder_block_out_channels": (256, 512, 512, 1024),
            "layers_per_block": (4, 6, 4, 2, 2),
            "decoder_layers_per_block": (4, 6, 4, 2, 2),
            "decoder_spatio_temporal_scaling": (True, True, True, True),
            "decoder_inject_noise": (False, False, False, False, False),
            "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
            "upsample_residual": (False, False, False, False),
            "upsample_factor": (2, 2, 1, 2),
            "decoder_spatial_padding_mode": "zeros",
            "spatial_compression_ratio": 32,
            "temporal_compression_ratio": 8,
        },
        vocoder=LTX2VocoderWithBWE,
    ),
}


def build(version: Version, device: torch.device, *, tiny: bool) -> Modules:
    """Build the modules of a Diffusers pipeline by name, in bfloat16 on the device, in eval mode."""
    torch.manual_seed(0)
    modules = _tiny(version, device) if tiny else _published(version, device)
    for module in modules.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    return modules


def _tiny(version: Version, device: torch.device) -> Modules:
    with tempfile.TemporaryDirectory() as folder:
        path = build_tiny_ltx2(Path(folder), version=version.tiny)
        pipeline = LTX2Pipeline.from_pretrained(path, dtype=torch.bfloat16).to(device)
    return {name: module for name, module in pipeline.components.items() if module is not None}


def _published(version: Version, device: torch.device) -> Modules:
    with device:
        # The vocoder's filters are computed in float32 and then cast.
        decoders = {
            "vae": AutoencoderKLLTX2Video(**version.vae),
            "audio_vae": AutoencoderKLLTX2Audio(),
            "vocoder": version.vocoder(),
        }
        _draw_filters(decoders["vocoder"])
        for module in decoders.values():
            module.bfloat16()
        with default_dtype(torch.bfloat16):
            large = {
                "transformer": LTX2VideoTransformer3DModel(**version.transformer),
                "connectors": LTX2TextConnectors(**version.connectors),
                "text_encoder": Gemma3ForConditionalGeneration(Gemma3Config(**_GEMMA_3_12B)),
            }
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    return {**large, **decoders, "tokenizer": gemma_tokenizer(), "scheduler": scheduler}


def _draw_filters(vocoder: nn.Module) -> None:
    """Randomize the spectrogram transforms, which are zero until a checkpoint is loaded."""
    for name, buffer in vocoder.named_buffers():
        if name.endswith("basis"):
            buffer.normal_(std=buffer.shape[-1] ** -0.5)


def config_of(modules: Modules, kind: type[LTX2PipelineConfig]) -> LTX2PipelineConfig:
    """Pipeline config of a checkpoint with these modules."""
    configs = {
        name: dict(modules[name].config) for name in ("transformer", "connectors", "vae", "audio_vae", "vocoder")
    }
    extends = type(modules["vocoder"]).__name__ == "LTX2VocoderWithBWE"
    return kind(
        transformer=LTX2TransformerConfig.from_dict("transformer", configs["transformer"]),
        connectors=LTX2ConnectorsConfig.from_dict("connectors", configs["connectors"]),
        vae=LTX2VideoVAEConfig.from_dict("vae", configs["vae"]),
        audio_vae=LTX2AudioVAEConfig.from_dict("audio_vae", configs["audio_vae"]),
        vocoder=LTX2VocoderConfig.from_dict("vocoder", configs["vocoder"], extends_bandwidth=extends),
        shift=SequenceShift.from_dict("scheduler", dict(modules["scheduler"].config)),
    )


def loaded_of(modules: Modules, transformer: OurTransformer) -> Modules:
    """Convert the modules to the form that the fleet's loaders return."""
    language_model = modules["text_encoder"].model.language_model
    language_model.config.use_cache = False
    language_model.config.output_hidden_states = True
    return {
        **modules,
        "text_encoder": language_model,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler.from_config(modules["scheduler"].config),
        "vae": LTX2VideoVAE(modules["vae"]),
        "audio_vae": LTX2AudioVAE(modules["audio_vae"]),
    }


def stages_of(spec: ServiceSpec, config: LTX2PipelineConfig, runtime: Runtime, loaded: Modules) -> list[Any]:
    """Build the stages of a service."""
    return [
        resolve(stage.implementation)(
            config, runtime, {role: loaded[name] for role, name in stage.modules.items()}
        ).bind(stage.contract)
        for stage in spec.stages
    ]


def same_weights(theirs: Any) -> OurTransformer:
    """This project's transformer on the reference's tensors."""
    with torch.device("meta"):
        ours = OurTransformer(LTX2TransformerConfig.from_dict("transformer", dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    ours.requires_grad_(False).eval()
    join_all_weights(ours)
    return ours
