"""Architecture of the LTX-2 DiT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from configs.models.fields import ConfigFields

RopeType = Literal["interleaved", "split"]


@dataclass(frozen=True, kw_only=True)
class LTX2ModalityConfig:
    """Sizes of one modality, video or audio.

    `is_gated`: attention has a gate per head. `modulates_text`: queries of text cross-attention are modulated by the
    timestep.
    """

    in_channels: int
    out_channels: int
    num_heads: int
    head_size: int
    cross_attention_dim: int
    is_gated: bool
    modulates_text: bool

    @property
    def hidden_size(self) -> int:
        """Hidden size of the residual stream."""
        return self.num_heads * self.head_size


@dataclass(frozen=True, kw_only=True)
class LTX2TransformerConfig:
    """LTX2VideoTransformer3DModel's config.json; a latent is a token. The defaults are those of LTX-2.0.

    `caption_channels` is the size of text embeddings, which the model projects; None if the connectors already project
    them to the hidden sizes (LTX-2.3). A video latent covers `spatial_factor` pixels along each side and
    `temporal_factor` frames; an audio latent covers `audio_factor` spectrogram frames. Positions are normalized by
    `max_seconds` and `audio_max_seconds`, and by `base_height` and `base_width` (pixels). `gate_timestep_factor` scales
    the timestep of the gates of cross-modal attention. `skips_attention`: a guidance branch may skip self-attention of
    some blocks (STG).
    """

    video: LTX2ModalityConfig
    audio: LTX2ModalityConfig
    num_layers: int = 48
    caption_channels: int | None = 3840
    eps: float = 1e-6
    rope_type: RopeType = "interleaved"
    rope_theta: float = 10000.0
    is_rope_double: bool = True
    temporal_factor: int = 8
    spatial_factor: int = 32
    max_seconds: int = 20
    base_height: int = 2048
    base_width: int = 2048
    causal_offset: int = 1
    audio_factor: int = 4
    audio_max_seconds: int = 20
    audio_sampling_rate: int = 16000
    audio_hop_length: int = 160
    gate_timestep_factor: float = 1.0
    skips_attention: bool = False

    @property
    def modulates_text(self) -> bool:
        """Whether keys and values of the text are modulated by the timestep."""
        return self.video.modulates_text or self.audio.modulates_text

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        _refuse_other_models(fields)
        temporal_factor, spatial_factor = _video_factors(fields)
        projects_text = fields.flag("use_prompt_embeddings", True)
        scale = fields.integer("timestep_scale_multiplier", 1000)
        config = cls(
            video=_modality(fields, "", head_size=128, cross_attention_dim=4096),
            audio=_modality(fields, "audio_", head_size=64, cross_attention_dim=2048),
            num_layers=fields.integer("num_layers", cls.num_layers),
            caption_channels=fields.integer("caption_channels", 3840) if projects_text else None,
            eps=fields.number("norm_eps", cls.eps),
            rope_type=_rope_type(fields),
            rope_theta=fields.number("rope_theta", cls.rope_theta),
            is_rope_double=fields.flag("rope_double_precision", cls.is_rope_double),
            temporal_factor=temporal_factor,
            spatial_factor=spatial_factor,
            max_seconds=fields.integer("pos_embed_max_pos", cls.max_seconds),
            base_height=fields.integer("base_height", cls.base_height),
            base_width=fields.integer("base_width", cls.base_width),
            causal_offset=fields.integer("causal_offset", cls.causal_offset, minimum=0),
            audio_factor=fields.integer("audio_scale_factor", cls.audio_factor),
            audio_max_seconds=fields.integer("audio_pos_embed_max_pos", cls.audio_max_seconds),
            audio_sampling_rate=fields.integer("audio_sampling_rate", cls.audio_sampling_rate),
            audio_hop_length=fields.integer("audio_hop_length", cls.audio_hop_length),
            gate_timestep_factor=fields.integer("cross_attn_timestep_scale_multiplier", 1000) / scale,
            skips_attention=fields.flag("perturbed_attn", cls.skips_attention),
        )
        config._check_modalities(fields)
        return config

    def _check_modalities(self, fields: ConfigFields) -> None:
        """Check that the modalities can attend to each other and to the text. Raises CheckpointError."""
        if self.video.num_heads != self.audio.num_heads:
            raise fields.error("audio_num_attention_heads", f"{self.video.num_heads}, the value of num_attention_heads")
        for prefix, modality in (("", self.video), ("audio_", self.audio)):
            if modality.cross_attention_dim != modality.hidden_size:
                raise fields.error(f"{prefix}cross_attention_dim", f"{modality.hidden_size}, heads x head size")
            if modality.head_size % 2:
                raise fields.error(f"{prefix}attention_head_dim", "even; RoPE rotates pairs of channels")


def _refuse_other_models(fields: ConfigFields) -> None:
    """Reject values that only other or later models have. Raises CheckpointError."""
    for name in ("patch_size", "patch_size_t", "audio_patch_size", "audio_patch_size_t"):
        fields.only(name, 1)
    for name in ("attention_bias", "attention_out_bias", "ff_bias", "audio_ff_bias", "use_prompt_adaln_single"):
        fields.only(name, True)
    for name in ("norm_elementwise_affine", "use_keyframes_abs_pos_embedding"):
        fields.only(name, False)
    fields.only("activation_fn", "gelu-approximate")
    fields.only("qk_norm", "rms_norm_across_heads")


def _video_factors(fields: ConfigFields) -> tuple[int, int]:
    match fields.integers("vae_scale_factors", (8, 32, 32)):
        case (frames, rows, columns) if rows == columns:
            return frames, rows
        case _:
            raise fields.error("vae_scale_factors", "[frames, rows, columns] with as many rows as columns")


def _rope_type(fields: ConfigFields) -> RopeType:
    match fields.values.get("rope_type", "interleaved"):
        case "interleaved":
            return "interleaved"
        case "split":
            return "split"
        case _:
            raise fields.error("rope_type", "'interleaved' or 'split'")


def _modality(fields: ConfigFields, prefix: str, *, head_size: int, cross_attention_dim: int) -> LTX2ModalityConfig:
    in_channels = fields.integer(f"{prefix}in_channels", 128)
    return LTX2ModalityConfig(
        in_channels=in_channels,
        out_channels=fields.integer(f"{prefix}out_channels", in_channels),
        num_heads=fields.integer(f"{prefix}num_attention_heads", 32),
        head_size=fields.integer(f"{prefix}attention_head_dim", head_size),
        cross_attention_dim=fields.integer(f"{prefix}cross_attention_dim", cross_attention_dim),
        is_gated=fields.flag(f"{prefix}gated_attn", False),
        modulates_text=fields.flag(f"{prefix}cross_attn_mod", False),
    )
