"""Decodes latents to complete files: images, and videos with audio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from common.artifacts import LatentPart, Media
from common.stage import Call, PipelineStage
from configs.pipeline_configs.base import DecodingConfig
from models.contracts import DecodingInput, DecodingOutput
from models.media import MP4, PNG, SAFETENSORS, Audio, mp4_bytes, png_bytes
from models.runtime import Runtime
from models.stages.decoded_media import DEFAULT_FRAME_RATE, check_finite, media_item, pixels_of, unsupported_format


class DecodingStage(PipelineStage[DecodingInput, DecodingOutput]):
    """Decodes to one PNG per image or layer, one MP4 per video, or one safetensors file.

    MP4 requires a model with an audio VAE and a vocoder. A thread encodes frames while later frames of the video VAE's
    output are converted to pixels.
    """

    def __init__(self, config: DecodingConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._device = runtime.device
        self._dtype = config.dtype_of("vae", runtime.dtype)
        self._vae = modules["vae"]
        has_audio = config.audio_part is not None
        self._audio_vae, self._vocoder = (modules[role] if has_audio else None for role in ("audio_vae", "vocoder"))

    @torch.inference_mode()
    def run(self, x: DecodingInput, call: Call) -> DecodingOutput:
        """Return the finished files. Raises InvalidInput for an unsupported format."""
        part = x.denoised_latents.parts[self._config.visual_part]
        is_video = self._config.visual_part == "video"
        match x.canvas.output_format:
            case "safetensors":
                pixels = self._video_tensor(part, x, call) if is_video else self._image_tensor(part, call)
                saved = {"latents": self._saved(self._config.visual_part, part, self._vae), "pixels": pixels}
                files, kind = [save({**saved, **self._audio_tensors(x)})], SAFETENSORS
            case "png" if not is_video:
                files, kind = [png_bytes(each) for each in self._images(part, call)], PNG
            case "mp4" if is_video:
                files, kind = [self._mp4(part, index, x, call) for index in range(part.latents.shape[0])], MP4
            case other:
                raise unsupported_format(other, "mp4" if is_video else "png")
        frames = self._config.num_frames(x.canvas)
        return DecodingOutput(media=Media(items=tuple(media_item(file, kind, x.canvas, frames) for file in files)))

    def _image_tensor(self, part: LatentPart, call: Call) -> Tensor:
        """Pixels of all outputs in the layout of Diffusers' output."""
        return self._config.saved_pixels(self._images(part, call), part.latents.shape[0])

    def _images(self, part: LatentPart, call: Call) -> Tensor:
        """Pixels of all images, (images, channels, height, width); one or more images per output."""
        decoded: Tensor = self._vae.decode(self._vae_latents(part.latents, part.raw_latent_shape), return_dict=False)[0]
        # A video model's VAE decodes an image as a video of one frame.
        pixels = pixels_of(decoded[:, :, 0] if decoded.ndim == 5 else decoded)
        call.progress(1, 1)
        return pixels

    def _frames(self, part: LatentPart, index: int, x: DecodingInput, call: Call) -> Iterator[Tensor]:
        """Frames of one output, each (3, height, width)."""
        frames = self._config.num_frames(x.canvas)
        shape, total = part.raw_latent_shape, frames * part.latents.shape[0]
        latents = self._vae_latents(part.latents[index : index + 1], (1, *shape[1:]))
        for number, frame in enumerate(self._vae.decode(latents), index * frames):
            yield pixels_of(frame)
            call.progress(number + 1, total)

    def _vae_latents(self, latents: Tensor, raw_latent_shape: tuple[int, ...]) -> Tensor:
        raw = self._config.unpack(self._config.visual_part, latents.to(self._device), raw_latent_shape)
        return self._config.vae_latents(raw.to(self._dtype))

    def _video_tensor(self, part: LatentPart, x: DecodingInput, call: Call) -> Tensor:
        """Pixels of all outputs, (outputs, frames, 3, height, width)."""
        outputs = range(part.latents.shape[0])
        return torch.stack([torch.stack(list(self._frames(part, index, x, call))) for index in outputs])

    def _mp4(self, part: LatentPart, index: int, x: DecodingInput, call: Call) -> bytes:
        canvas, audio_part = x.canvas, self._audio_part(x)
        assert audio_part is not None, "only models with audio are decoded to MP4 here"
        (samples,) = self._samples(audio_part.latents[index : index + 1])
        audio = Audio(samples, self._config.sampling_rate)
        frames = self._frames(part, index, x, call)
        return mp4_bytes(frames, canvas.height, canvas.width, canvas.frame_rate or DEFAULT_FRAME_RATE, audio)

    def _audio_part(self, x: DecodingInput) -> LatentPart | None:
        name = self._config.audio_part
        return None if name is None else x.denoised_latents.parts[name]

    def _audio_tensors(self, x: DecodingInput) -> dict[str, Tensor]:
        """Latents and samples of the audio; empty for a model without audio."""
        part, name = self._audio_part(x), self._config.audio_part
        if part is None or name is None:
            return {}
        samples = torch.cat([self._samples(each[None]) for each in part.latents])
        return {"audio_latents": self._saved(name, part, self._audio_vae), "audio": samples}

    def _samples(self, latents: Tensor) -> Tensor:
        """Audio samples, float32 (outputs, channels, samples) in [-1, 1], on the CPU."""
        assert self._audio_vae is not None, "only models with audio have an audio part"
        assert self._vocoder is not None, "only models with audio have an audio part"
        samples: Tensor = self._vocoder(self._audio_vae.decode(latents.to(self._device)))
        return check_finite(samples.float().cpu().contiguous(), "audio")

    def _saved(self, name: str, part: LatentPart, decoder: Any) -> Tensor:
        """A part's latents in the layout of Diffusers' output."""
        return self._config.saved_latents(name, part.latents, part.raw_latent_shape, decoder).contiguous()
