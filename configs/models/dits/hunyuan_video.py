"""Architecture of the HunyuanVideo DiT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.dits.flux import FluxTransformerConfig
from configs.models.fields import ConfigFields

PATCH = 2
"""Latents along each side of a token, within one latent frame."""


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoTransformerConfig:
    """HunyuanVideoTransformer3DModel's config.json; the defaults are HunyuanVideo's."""

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    guidance_embeds: bool = True
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @property
    def hidden_size(self) -> int:
        """Hidden size of the residual streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def blocks(self) -> FluxTransformerConfig:
        """Sizes of the blocks and the conditioning vector, which have the architecture of a Flux DiT."""
        return FluxTransformerConfig(
            attention_head_dim=self.attention_head_dim,
            num_attention_heads=self.num_attention_heads,
            pooled_projection_dim=self.pooled_projection_dim,
            guidance_embeds=self.guidance_embeds,
        )

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        fields.only("patch_size", PATCH)
        fields.only("patch_size_t", 1)
        fields.only("mlp_ratio", 4.0)
        fields.only("qk_norm", "rms_norm")
        if values.get("image_condition_type") is not None:
            raise fields.error("image_condition_type", "null; image inputs are not supported")
        in_channels = fields.integer("in_channels", cls.in_channels)
        head_dim = fields.integer("attention_head_dim", cls.attention_head_dim)
        axes = fields.integers("rope_axes_dim", cls.axes_dims_rope)
        if len(axes) != 3 or sum(axes) != head_dim or any(axis % 2 for axis in axes):
            raise fields.error("rope_axes_dim", f"three even numbers whose sum is the head size {head_dim}")
        return cls(
            in_channels=in_channels,
            out_channels=fields.integer("out_channels", in_channels),
            num_attention_heads=fields.integer("num_attention_heads", cls.num_attention_heads),
            attention_head_dim=head_dim,
            num_layers=fields.integer("num_layers", cls.num_layers, minimum=0),
            num_single_layers=fields.integer("num_single_layers", cls.num_single_layers, minimum=0),
            num_refiner_layers=fields.integer("num_refiner_layers", cls.num_refiner_layers, minimum=0),
            guidance_embeds=fields.flag("guidance_embeds", cls.guidance_embeds),
            text_embed_dim=fields.integer("text_embed_dim", cls.text_embed_dim),
            pooled_projection_dim=fields.integer("pooled_projection_dim", cls.pooled_projection_dim),
            rope_theta=fields.number("rope_theta", cls.rope_theta),
            axes_dims_rope=axes,
        )
