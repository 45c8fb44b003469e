"""The VAE of Wan 2.1 and of Wan 2.2 TI2V-5B: decodes frame by frame in bounded memory.

The convolutions are causal, so that a frame can be decoded when its latents arrive. Diffusers also decodes latent
frames sequentially, but processes four frames at once in the widest layers and stores the whole video. Here each frame
passes through all layers separately, and each convolution caches the two preceding frames. A video that would still
exceed the memory bound is decoded in strips, which overlap by the receptive field of the convolutions. The classes in
models/vaes/wan_layers.py wrap Diffusers' modules with their weights; results are equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.loader import load_pretrained
from models.vaes.wan_layers import (
    FrameLayer,
    UpBlock,
    arrange_weights,
    feed_through,
    head_layers,
    tail_layers,
    up_blocks,
)

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint

DECODING_BYTES = 3_750_000_000
"""Memory bound of decoding with Wan 2.1's VAE in bytes.

Excludes the weights, and convolution workspaces of 250 MB.
"""

RESIDUAL_DECODING_BYTES = 12_000_000_000
"""Memory bound of decoding with Wan 2.2 TI2V-5B's VAE in bytes.

Sufficient for 704x1280 in one strip in float32; in bfloat16, that size takes 4.9 GB for any number of frames.
"""

# Memory used while a frame is decoded, besides the cached frames, in frames of the widest layer. An estimate: the
# measured peak is 12.2 frames with Wan 2.1's VAE and 7.4 frames with Wan 2.2 TI2V-5B's VAE.
_WORKING_FRAMES = 12


@dataclass(frozen=True)
class _TailCosts:
    """Memory and receptive field of the upsampling layers.

    `cached` and `working` are numbers of values per latent pixel: stored between frames, and allocated while a frame is
    processed. `reach` is the radius of the receptive field, in latent pixels.
    """

    cached: int
    working: int
    reach: int


def _tail_costs(blocks: Sequence[UpBlock], last_channels: int) -> _TailCosts:
    """Costs of the up blocks and the last convolution, which has `last_channels` input channels.

    Each convolution over time caches two frames. Each convolution over space extends the receptive field by one pixel
    at its own resolution.
    """
    values, widest, reach, scale = 0, 0, 0.0, 1
    for block in blocks:
        for resnet in block.resnets:
            values += 2 * (resnet.conv1.in_channels + resnet.conv2.in_channels) * scale**2
            widest = max(widest, resnet.conv1.in_channels * scale**2, resnet.conv2.out_channels * scale**2)
            reach += 2 / scale
        if (resample := block.resample) is not None:
            values += 2 * resample.time_conv.in_channels * scale**2 if resample.mode == "upsample3d" else 0
            widest = max(widest, 2 * resample.resample[1].in_channels * scale**2)
            scale *= 2
            reach += 1 / scale
    values += 2 * last_channels * scale**2
    return _TailCosts(values, _WORKING_FRAMES * widest, int(reach + 1 / scale) + 1)


@dataclass(frozen=True)
class _Strip:
    """A range of latent rows or columns.

    `begin` to `end` is the output range; `low` to `high` also includes rows or columns decoded only as spatial context.
    """

    begin: int
    end: int
    low: int
    high: int


class DecodingSession:
    """Decodes one video whose latents arrive in parts; caches the frames that later frames depend on.

    The caches are freed after the last of `num_latent_frames`. A video in one strip is decoded as its latents arrive.
    With several strips, the caches of all strips would exceed the memory bound: the session then stores only the
    low-resolution features before the upsampling layers, and decodes strip by strip after the last latents.
    """

    def __init__(self, vae: WanVAE, num_latent_frames: int, strips: Sequence[_Strip], dim: int) -> None:
        self._vae = vae
        self._missing = num_latent_frames
        self._strips = strips
        self._dim = dim
        self._features: list[Tensor] = []
        self._layers = vae.head() if len(strips) > 1 else [*vae.head(), *vae.tail()]

    def feed(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode the next latents (1, z, latent frames, h, w) to frames (3, H, W) in [-1, 1].

        With one strip, frames are on the VAE's device and decoded lazily; the caller must consume all of them before
        the next call. With several strips, all frames are yielded after the last latents, on the CPU. Raises ValueError
        for more latent frames than `num_latent_frames`.
        """
        self._missing -= latents.shape[2]
        if self._missing < 0:
            raise ValueError(f"latents: {latents.shape[2]} frames are {-self._missing} more than the video has left")
        for latent_frame in self._vae.latent_frames(latents):
            for frame in feed_through(self._layers, latent_frame):
                if len(self._strips) > 1:
                    self._features.append(frame)
                else:
                    yield frame[0].clamp(-1, 1)
        if not self._missing:
            self._layers = []
            if len(self._strips) > 1:
                yield from self._joined_strips()

    def _joined_strips(self) -> Iterator[Tensor]:
        pieces = [self._decode_strip(strip) for strip in self._strips]
        self._features = []
        for parts in zip(*pieces, strict=True):
            yield torch.cat(parts, dim=self._dim)

    def _decode_strip(self, strip: _Strip) -> list[Tensor]:
        """Decode the strip's output range of each frame."""
        layers, dim = self._vae.tail(), self._dim
        frames: list[Tensor] = []
        for feature in self._features:
            for frame in feed_through(layers, feature.narrow(dim, strip.low, strip.high - strip.low)):
                side = frame.shape[dim] // (strip.high - strip.low)
                piece = frame[0].narrow(dim, (strip.begin - strip.low) * side, (strip.end - strip.begin) * side)
                frames.append(piece.clamp(-1, 1).cpu())
        return frames


class WanVAE:
    """Wraps Diffusers' AutoencoderKLWan of Wan 2.1 and Wan 2.2 5B, for one video at a time.

    `decoding_bytes` bounds the memory of decoding, excluding weights; None: the default of the VAE's version.
    """

    def __init__(self, vae: Any, decoding_bytes: int | None = None) -> None:
        is_residual = vae.config.is_residual
        self._vae = vae
        self._blocks = up_blocks(vae.decoder, is_residual=is_residual)
        self._patch_size: int = vae.config.patch_size or 1
        self._decoding_bytes = decoding_bytes or (RESIDUAL_DECODING_BYTES if is_residual else DECODING_BYTES)
        arrange_weights(vae.decoder)

    def encode(self, video: Tensor) -> Tensor:
        """Mode of the latents (1, z, latent frames, h, w) of a video (1, 3, frames, H, W) in [-1, 1]."""
        parameter = next(self._vae.parameters())
        latents: Tensor = self._vae.encode(video.to(parameter.device, parameter.dtype)).latent_dist.mode()
        return latents

    def session(self, num_latent_frames: int, height: int, width: int, *, concurrent: int = 1) -> DecodingSession:
        """Start decoding a video with latents of this height and width.

        If `concurrent` videos of this size are decoded alternately, the memory bound covers the caches of all of them.
        """
        strips = self._strips(num_latent_frames, height, width, concurrent)
        return DecodingSession(self, num_latent_frames, strips, -1 if width >= height else -2)

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode latents (1, z, latent frames, h, w) to frames (3, H, W) in [-1, 1]; see DecodingSession."""
        return self.session(*latents.shape[2:]).feed(latents)

    def head(self) -> list[FrameLayer]:
        """The layers at the latents' resolution, with empty caches."""
        return head_layers(self._vae.decoder)

    def tail(self) -> list[FrameLayer]:
        """The upsampling layers, with empty caches."""
        return tail_layers(self._vae.decoder, self._blocks, self._patch_size)

    def latent_frames(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the first layer's input (1, z, h, w) for each latent frame."""
        layout = torch.channels_last if latents.is_cuda else torch.contiguous_format
        for latent_frame in latents.tensor_split(latents.shape[2], dim=2):
            yield self._vae.post_quant_conv(latent_frame)[:, :, 0].contiguous(memory_format=layout)

    def _strips(self, num_latent_frames: int, height: int, width: int, concurrent: int) -> list[_Strip]:
        """Split the longer side into the smallest number of equal strips within the memory bound."""
        costs = _tail_costs(self._blocks, self._vae.decoder.conv_out.in_channels)
        side, across = max(height, width), min(height, width)
        first = self._vae.decoder.conv_in
        item = first.weight.element_size()
        features = concurrent * num_latent_frames * first.out_channels * side * across * item
        strips: list[_Strip] = []
        for count in range(1, side + 1):
            edges = [side * i // count for i in range(count + 1)]
            strips = [
                _Strip(begin, end, max(begin - costs.reach, 0), min(end + costs.reach, side))
                for begin, end in pairwise(edges)
            ]
            widest = max(strip.high - strip.low for strip in strips)
            values = costs.working + costs.cached * (concurrent if count == 1 else 1)
            needed = widest * across * values * item + (features if count > 1 else 0)
            # Narrower strips would consist mostly of context: they would cost time and save little memory.
            if needed <= self._decoding_bytes or side // count <= costs.reach // 2:
                return strips
        return strips


def load_wan_vae(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> WanVAE:
    """Load Diffusers' AutoencoderKLWan. Raises CheckpointError."""
    return WanVAE(load_pretrained(checkpoint, name, device, dtype))
