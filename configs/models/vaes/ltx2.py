"""Architectures of Diffusers' AutoencoderKLLTX2Video, AutoencoderKLLTX2Audio and LTX2Vocoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields
from configs.models.vaes.frames import FrameGrid

_AUDIO_FACTOR = 4
"""Size of an audio latent: number of spectrogram frames, and number of mel bins."""
_AAC_RATES = (7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
"""Sampling rates of AAC, in Hz."""


@dataclass(frozen=True, kw_only=True)
class LTX2VideoVAEConfig(FrameGrid):
    """Entries of AutoencoderKLLTX2Video's config.json that determine the shape of the latents.

    A latent covers `spatial_factor` pixels along each side. Statistics to normalize latents are stored in the weights.
    Latents must have at least `min_latents` rows and columns, as the decoder may use reflection padding.
    """

    latent_channels: int
    spatial_factor: int
    min_latents: int

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError, also for contradictory entries."""
        fields = ConfigFields(module, values)
        fields.only("timestep_conditioning", False)
        fields.only("patch_size_t", 1)
        spatial, temporal = _factors(fields)
        padding = fields.values.get("decoder_spatial_padding_mode") or "reflect"
        return cls(
            latent_channels=fields.integer("latent_channels", 128),
            spatial_factor=spatial,
            temporal_factor=temporal,
            min_latents=2 if padding == "reflect" else 1,
        )


@dataclass(frozen=True, kw_only=True)
class LTX2AudioVAEConfig:
    """Entries of AutoencoderKLLTX2Audio's config.json that determine the shape of the latents.

    A latent covers 4 spectrogram frames of `hop_length` samples and 4 of the `mel_bins`. The spectrogram has `channels`
    channels.
    """

    latent_channels: int
    mel_bins: int
    channels: int
    sampling_rate: int
    hop_length: int

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError, also for contradictory entries."""
        fields = ConfigFields(module, values)
        config = cls(
            latent_channels=fields.integer("latent_channels", 8),
            mel_bins=fields.integer("mel_bins", 64),
            channels=fields.integer("output_channels", 2),
            sampling_rate=fields.integer("sample_rate", 16000),
            hop_length=fields.integer("mel_hop_length", 160),
        )
        if fields.integer("base_channels", 128) != config.token_channels:
            message = f"{config.token_channels}, latent channels x latent mel bins"
            raise fields.error("base_channels", message)
        return config

    @property
    def latent_bins(self) -> int:
        """Number of mel bins of the latents."""
        return self.mel_bins // _AUDIO_FACTOR

    @property
    def token_channels(self) -> int:
        """Channels of an audio token: latent channels x latent mel bins."""
        return self.latent_channels * self.latent_bins

    def latent_length(self, num_frames: int, frame_rate: float) -> int:
        """Number of audio latents for a video's duration; 0 if the video is too short. `frame_rate` is in Hz."""
        per_second = self.sampling_rate / self.hop_length / float(_AUDIO_FACTOR)
        return round(num_frames / frame_rate * per_second)


@dataclass(frozen=True, kw_only=True)
class LTX2VocoderConfig:
    """config.json of LTX2Vocoder or LTX2VocoderWithBWE. `sampling_rate` is the output rate in Hz."""

    in_channels: int
    sampling_rate: int

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any], *, extends_bandwidth: bool) -> Self:
        """Parse config.json. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        rate = fields.integer("output_sampling_rate", 48000 if extends_bandwidth else 24000)
        if rate not in _AAC_RATES:
            raise fields.error("output_sampling_rate", "a sampling rate of AAC; 24000 and 48000 work")
        name = "bwe_out_channels" if extends_bandwidth else "out_channels"
        if fields.integer(name, 2) > 2:
            raise fields.error(name, "1 or 2; MP4 files have mono or stereo audio")
        return cls(in_channels=fields.integer("in_channels", 128), sampling_rate=rate)


def _factors(fields: ConfigFields) -> tuple[int, int]:
    """Spatial factor (pixels) and temporal factor (frames) of a latent.

    Raises CheckpointError if the compression ratios contradict the decoder's layers.
    """
    kinds = fields.values.get("upsample_type") or ("spatiotemporal",) * 3
    scaling = fields.values.get("decoder_spatio_temporal_scaling", True)
    does_scale = scaling if isinstance(scaling, list | tuple) else (scaling,) * len(kinds)
    if len(does_scale) != len(kinds):
        raise fields.error("decoder_spatio_temporal_scaling", f"a list of {len(kinds)} entries, as upsample_type")
    layers = [kind for kind, scales in zip(kinds, does_scale, strict=True) if scales]
    spatial = fields.integer("patch_size", 4) * 2 ** sum(kind != "temporal" for kind in layers)
    temporal = 2 ** sum(kind != "spatial" for kind in layers)
    for name, factor in (("spatial_compression_ratio", spatial), ("temporal_compression_ratio", temporal)):
        if fields.integer(name, factor) != factor:
            raise fields.error(name, f"{factor}, the factor of the decoder's layers")
    return spatial, temporal
