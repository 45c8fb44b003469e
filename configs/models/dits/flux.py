"""Architecture of the Flux DiT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields


@dataclass(frozen=True, kw_only=True)
class FluxTransformerConfig:
    """FluxTransformer2DModel's config.json; the defaults are FLUX.1-schnell's."""

    in_channels: int = 64
    out_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @property
    def hidden_size(self) -> int:
        """Hidden size of the residual streams."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        fields.only("patch_size", 1)
        in_channels = fields.integer("in_channels", cls.in_channels)
        head_dim = fields.integer("attention_head_dim", cls.attention_head_dim)
        axes = fields.integers("axes_dims_rope", cls.axes_dims_rope)
        if len(axes) != 3 or sum(axes) != head_dim or any(axis % 2 for axis in axes):
            raise fields.error("axes_dims_rope", f"three even numbers whose sum is the head size {head_dim}")
        return cls(
            in_channels=in_channels,
            out_channels=fields.integer("out_channels", in_channels),
            num_layers=fields.integer("num_layers", cls.num_layers, minimum=0),
            num_single_layers=fields.integer("num_single_layers", cls.num_single_layers, minimum=0),
            attention_head_dim=head_dim,
            num_attention_heads=fields.integer("num_attention_heads", cls.num_attention_heads),
            joint_attention_dim=fields.integer("joint_attention_dim", cls.joint_attention_dim),
            pooled_projection_dim=fields.integer("pooled_projection_dim", cls.pooled_projection_dim),
            guidance_embeds=fields.flag("guidance_embeds", cls.guidance_embeds),
            axes_dims_rope=axes,
        )
