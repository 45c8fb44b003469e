"""Architecture of the Qwen-Image DiT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields


@dataclass(frozen=True, kw_only=True)
class QwenImageTransformerConfig:
    """QwenImageTransformer2DModel's config.json; the defaults are Qwen-Image's.

    `out_channels` are channels of latents; a token is a 2x2 patch of latents. `zero_cond_t`: tokens of input images
    have the timestep 0. `use_layer3d_rope`: the first position axis is the layer, and the input image precedes the
    first layer.
    """

    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False

    @property
    def hidden_size(self) -> int:
        """Hidden size of the residual streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def token_channels(self) -> int:
        """Channels of an output token."""
        return 4 * self.out_channels

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        fields.only("patch_size", 2)
        fields.only("guidance_embeds", False)
        head_dim = fields.integer("attention_head_dim", cls.attention_head_dim)
        axes = fields.integers("axes_dims_rope", cls.axes_dims_rope)
        if len(axes) != 3 or sum(axes) != head_dim or any(axis % 2 for axis in axes):
            raise fields.error("axes_dims_rope", f"three even numbers whose sum is the head size {head_dim}")
        return cls(
            in_channels=fields.integer("in_channels", cls.in_channels),
            out_channels=fields.integer("out_channels", cls.out_channels),
            num_layers=fields.integer("num_layers", cls.num_layers, minimum=0),
            attention_head_dim=head_dim,
            num_attention_heads=fields.integer("num_attention_heads", cls.num_attention_heads),
            joint_attention_dim=fields.integer("joint_attention_dim", cls.joint_attention_dim),
            axes_dims_rope=axes,
            zero_cond_t=fields.flag("zero_cond_t", cls.zero_cond_t),
            use_additional_t_cond=fields.flag("use_additional_t_cond", cls.use_additional_t_cond),
            use_layer3d_rope=fields.flag("use_layer3d_rope", cls.use_layer3d_rope),
        )
