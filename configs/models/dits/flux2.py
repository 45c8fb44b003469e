"""Architecture of the FLUX.2 DiT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields

MLP_RATIO = 3
"""Ratio of the feed-forward hidden size to the hidden size of the residual streams."""


@dataclass(frozen=True, kw_only=True)
class Flux2TransformerConfig:
    """Flux2Transformer2DModel's config.json; the defaults are FLUX.2-dev's."""

    in_channels: int = 128
    out_channels: int = 128
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    sinusoid_size: int = 256
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000.0
    guidance_embeds: bool = True

    @property
    def hidden_size(self) -> int:
        """Hidden size of the residual streams."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        fields.only("patch_size", 1)
        fields.only("mlp_ratio", float(MLP_RATIO))
        fields.only("eps", 1e-6)
        in_channels = fields.integer("in_channels", cls.in_channels)
        head_dim = fields.integer("attention_head_dim", cls.attention_head_dim)
        axes = fields.integers("axes_dims_rope", cls.axes_dims_rope)
        if len(axes) != 4 or sum(axes) != head_dim or any(axis % 2 for axis in axes):
            raise fields.error("axes_dims_rope", f"four even numbers whose sum is the head size {head_dim}")
        sinusoid_size = fields.integer("timestep_guidance_channels", cls.sinusoid_size)
        if sinusoid_size % 2:
            raise fields.error("timestep_guidance_channels", "even")
        return cls(
            in_channels=in_channels,
            out_channels=fields.integer("out_channels", in_channels),
            num_layers=fields.integer("num_layers", cls.num_layers, minimum=0),
            num_single_layers=fields.integer("num_single_layers", cls.num_single_layers, minimum=0),
            attention_head_dim=head_dim,
            num_attention_heads=fields.integer("num_attention_heads", cls.num_attention_heads),
            joint_attention_dim=fields.integer("joint_attention_dim", cls.joint_attention_dim),
            sinusoid_size=sinusoid_size,
            axes_dims_rope=axes,
            rope_theta=fields.number("rope_theta", cls.rope_theta),
            guidance_embeds=fields.flag("guidance_embeds", cls.guidance_embeds),
        )
