"""Architecture of the GLM-Image DiT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields


@dataclass(frozen=True, kw_only=True)
class GlmImageTransformerConfig:
    """GlmImageTransformer2DModel's config.json; the defaults are those of Diffusers' class.

    Channels are those of a latent: a token holds 2x2 of them. `codebook_size` is the number of prior tokens that the
    DiT has embeddings for.
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
        """Width of the residual streams."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Read config.json of the module. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        fields.only("patch_size", 2)
        head_dim = fields.integer("attention_head_dim", cls.attention_head_dim)
        if head_dim % 4:
            raise fields.error("attention_head_dim", "must be a multiple of 4: rows and columns rotate pairs of it")
        for name, default in (("time_embed_dim", cls.time_embed_dim), ("condition_dim", cls.condition_dim)):
            if fields.integer(name, default) % 2:
                raise fields.error(name, "must be even: it holds cosines and sines")
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
