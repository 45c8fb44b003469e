"""Architecture of the Wan DiT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from configs.models.fields import ConfigFields


@dataclass(frozen=True, kw_only=True)
class WanTransformerConfig:
    """WanTransformer3DModel's config.json; the defaults are Wan2.1-T2V-14B's.

    `image_dim` and `added_kv_proj_dim` are the sizes of vision tokens before and after their projection; None for
    models without a vision encoder. `pos_embed_seq_len` is the number of vision tokens of the first and the last frame
    together, for models with both.
    """

    own_entries: ClassVar[tuple[str, ...]] = ()
    """Entries of config.json that Diffusers' class lacks."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    pos_embed_seq_len: int | None = None

    @property
    def hidden_size(self) -> int:
        """Hidden size of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def axes_dims_rope(self) -> tuple[int, int, int]:
        """Channels of a head that RoPE rotates by frame, row and column; frames get the remainder."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        fields.only("qk_norm", "rms_norm_across_heads")
        match fields.integers("patch_size", cls.patch_size):
            case (frames, rows, columns):
                patch_size = (frames, rows, columns)
            case _:
                raise fields.error("patch_size", "[frames, rows, columns]")
        in_channels = fields.integer("in_channels", cls.in_channels)
        config = cls(
            patch_size=patch_size,
            num_attention_heads=fields.integer("num_attention_heads", cls.num_attention_heads),
            attention_head_dim=fields.integer("attention_head_dim", cls.attention_head_dim),
            in_channels=in_channels,
            out_channels=fields.integer("out_channels", in_channels),
            text_dim=fields.integer("text_dim", cls.text_dim),
            freq_dim=fields.integer("freq_dim", cls.freq_dim),
            ffn_dim=fields.integer("ffn_dim", cls.ffn_dim),
            num_layers=fields.integer("num_layers", cls.num_layers, minimum=0),
            cross_attn_norm=fields.flag("cross_attn_norm", cls.cross_attn_norm),
            eps=fields.number("eps", cls.eps),
            image_dim=fields.integer("image_dim", 0, minimum=0) or None,
            added_kv_proj_dim=fields.integer("added_kv_proj_dim", 0, minimum=0) or None,
            pos_embed_seq_len=fields.integer("pos_embed_seq_len", 0, minimum=0) or None,
        )
        if (config.image_dim is None) != (config.added_kv_proj_dim is None):
            raise fields.error("added_kv_proj_dim", "consistent with image_dim; set both entries or neither")
        return config
