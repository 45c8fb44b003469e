"""Architecture of the LTX-Video DiT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields


@dataclass(frozen=True, kw_only=True)
class LTXVideoTransformerConfig:
    """LTXVideoTransformer3DModel's config.json; a latent is a token. The defaults are those of LTX-Video 2B."""

    in_channels: int = 128
    out_channels: int = 128
    num_attention_heads: int = 32
    attention_head_dim: int = 64
    num_layers: int = 28
    caption_channels: int = 4096
    eps: float = 1e-6

    @property
    def hidden_size(self) -> int:
        """Hidden size of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        for name in ("patch_size", "patch_size_t"):
            fields.only(name, 1)
        for name in ("attention_bias", "attention_out_bias"):
            fields.only(name, True)
        fields.only("norm_elementwise_affine", False)
        fields.only("activation_fn", "gelu-approximate")
        fields.only("qk_norm", "rms_norm_across_heads")
        in_channels = fields.integer("in_channels", cls.in_channels)
        config = cls(
            in_channels=in_channels,
            out_channels=fields.integer("out_channels", in_channels),
            num_attention_heads=fields.integer("num_attention_heads", cls.num_attention_heads),
            attention_head_dim=fields.integer("attention_head_dim", cls.attention_head_dim),
            num_layers=fields.integer("num_layers", cls.num_layers),
            caption_channels=fields.integer("caption_channels", cls.caption_channels),
            eps=fields.number("norm_eps", cls.eps),
        )
        if config.attention_head_dim % 2:
            raise fields.error("attention_head_dim", "even; RoPE rotates pairs of channels")
        if fields.integer("cross_attention_dim", 2048) != config.hidden_size:
            raise fields.error("cross_attention_dim", f"{config.hidden_size}, heads x head size")
        return config
