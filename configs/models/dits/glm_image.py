"""Architecture of the GLM-Image DiT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields


@dataclass(frozen=True, kw_only=True)
class GlmImageTransformerConfig:
    """GlmImageTransformer2DModel's config.json; the defaults are those of Diffusers' class.

    `in_channels` and `out_channels` are channels of latents; a token is a 2x2 patch of latents. `codebook_size` is the
    number of prior token embeddings.
    """

    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 30
    attention_head_dim: int = 40
    num_attention_heads: int = 64
    text_embed_dim: int = 1472
    time_embed_dim: int = 512
    condition_dim: int = 256
    codebook_size: int = 16384

    @property
    def hidden_size(self) -> int:
        """Hidden size of the residual streams."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        fields.only("patch_size", 2)
        head_dim = fields.integer("attention_head_dim", cls.attention_head_dim)
        if head_dim % 4:
            raise fields.error(
                "attention_head_dim", "a multiple of 4; RoPE rotates pairs of its channels by row and column"
            )
        for name, default in (("time_embed_dim", cls.time_embed_dim), ("condition_dim", cls.condition_dim)):
            if fields.integer(name, default) % 2:
                raise fields.error(name, "even; half of the embedding is cosines and half is sines")
        return cls(
            in_channels=fields.integer("in_channels", cls.in_channels),
            out_channels=fields.integer("out_channels", cls.out_channels),
            num_layers=fields.integer("num_layers", cls.num_layers, minimum=0),
            attention_head_dim=head_dim,
            num_attention_heads=fields.integer("num_attention_heads", cls.num_attention_heads),
            text_embed_dim=fields.integer("text_embed_dim", cls.text_embed_dim),
            time_embed_dim=fields.integer("time_embed_dim", cls.time_embed_dim),
            condition_dim=fields.integer("condition_dim", cls.condition_dim),
            codebook_size=fields.integer("prior_vq_quantizer_codebook_size", cls.codebook_size),
        )
