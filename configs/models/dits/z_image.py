"""Architecture of the Z-Image DiT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields

PATCH = 2
"""Latents along each side of a token."""


@dataclass(frozen=True, kw_only=True)
class ZImageTransformerConfig:
    """ZImageTransformer2DModel's config.json; the defaults are Z-Image's.

    `axes_lens` are the numbers of positions of the axes (sequence, row, column).
    """

    in_channels: int = 16
    hidden_size: int = 3840
    num_layers: int = 30
    num_refiner_layers: int = 2
    num_attention_heads: int = 30
    eps: float = 1e-5
    text_size: int = 2560
    rope_theta: float = 256.0
    time_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1024, 512, 512)

    @property
    def attention_head_dim(self) -> int:
        """Head size."""
        return self.hidden_size // self.num_attention_heads

    @property
    def feed_forward_size(self) -> int:
        """Hidden size of the gated feed-forward layers, rounded as in Diffusers."""
        return int(self.hidden_size / 3 * 8)

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        fields.only("qk_norm", True)
        for name, patch in (("all_patch_size", PATCH), ("all_f_patch_size", 1)):
            if fields.integers(name, (patch,)) != (patch,):
                raise fields.error(name, f"[{patch}], the only supported value")
        if values.get("siglip_feat_dim") is not None:
            raise fields.error("siglip_feat_dim", "null; image inputs are not supported")
        config = cls(
            in_channels=fields.integer("in_channels", cls.in_channels),
            hidden_size=fields.integer("dim", cls.hidden_size),
            num_layers=fields.integer("n_layers", cls.num_layers, minimum=0),
            num_refiner_layers=fields.integer("n_refiner_layers", cls.num_refiner_layers, minimum=0),
            num_attention_heads=fields.integer("n_heads", cls.num_attention_heads),
            eps=fields.number("norm_eps", cls.eps),
            text_size=fields.integer("cap_feat_dim", cls.text_size),
            rope_theta=fields.number("rope_theta", cls.rope_theta),
            time_scale=fields.number("t_scale", cls.time_scale),
            axes_dims=fields.integers("axes_dims", cls.axes_dims),
            axes_lens=fields.integers("axes_lens", cls.axes_lens),
        )
        if config.hidden_size % config.num_attention_heads:
            raise fields.error("dim", f"a multiple of n_heads, {config.num_attention_heads}")
        axes, head_dim = config.axes_dims, config.attention_head_dim
        if len(axes) != 3 or sum(axes) != head_dim or any(axis % 2 for axis in axes):
            raise fields.error("axes_dims", f"three even numbers whose sum is the head size {head_dim}")
        if len(config.axes_lens) != 3:
            raise fields.error("axes_lens", "a list of three numbers of positions")
        return config
