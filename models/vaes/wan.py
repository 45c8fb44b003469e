"""The VAE of Wan 2.1 and of Wan 2.2 TI2V-5B: decodes frame by frame, in bounded memory.

The convolutions are causal, so a frame can be decoded as soon as its latents are there. Diffusers' module decodes one
latent frame after the other too, but passes four frames at a time through the widest layers and stores the whole
video; here each frame passes all layers alone, and a convolution caches the two frames before it. A video that would
still exceed the bound is decoded in strips, which overlap by the pixels that the convolutions depend on. Weights and
modules are Diffusers' (models/vaes/wan_layers.py wraps them); results are equal up to rounding.
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
"""Most bytes that decoding with Wan 2.1's VAE takes beside the weights, without workspaces of convolutions (250 MB)."""

RESIDUAL_DECODING_BYTES = 12_000_000_000
"""Most bytes that decoding with Wan 2.2 TI2V-5B's VAE takes: enough for 704x1280 in one piece, in float32 too.

In bfloat16 that size takes 4.9 GB, whatever the number of frames.
"""

# Frames of the widest layer that are alive at a time beside the histories, with all that a residual block makes of one.
_FRAMES_AT_WORK = 12


@dataclass(frozen=True)
class _TailCosts:
    """What the layers that upsample need: values per latent pixel, and latent pixels that a pixel depends on.

    `cached` values are alive from one frame to the next, `working` values while a frame passes.
    """

    cached: int
    working: int
    reach: int


def _tail_costs(blocks: Sequence[UpBlock], last_channels: int) -> _TailCosts:
    """The costs of the up blocks and the last convolution, which has `last_channels` input channels.

    A convolution caches two frames and depends on one pixel further, at its own size.
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
    return _TailCosts(values, _FRAMES_AT_WORK * widest, int(reach + 1 / scale) + 1)


@dataclass(frozen=True)
class _Strip:
    """Rows or columns of latents: those that are wanted, and those that are decoded because the former look at them."""

    begin: int
    end: int
    low: int
    high: int


class DecodingSession:
    """Decodes one video whose latents arrive in parts. It caches what later frames depend on.

    The caches are dropped with the last of `num_latent_frames`. A video in one strip is decoded as its latents arrive.
    In several strips the caches of all of them would exceed the bound: the session then stores only the small features
    before the layers that upsample, and decodes strip by strip once the last latents are there.
    """

    def __init__(self, vae: WanVAE, num_latent_frames: int, strips: Sequence[_Strip], dim: int) -> None:
        self._vae = vae
        self._missing = num_latent_frames
        self._strips = strips
        self._dim = dim
        self._features: list[Tensor] = []
        self._layers = vae.head() if len(strips) > 1 else [*vae.head(), *vae.tail()]

    def feed(self, latents: Tensor) -> Iterator[Tensor]:
        """Frames (3, H, W) in [-1, 1] of the next latents (1, z, latent frames, h, w).

        In one strip they are on the VAE's device, each made when it is asked for, and all must be taken before the next
        call. In several strips all frames come with the last latents, on the CPU. Raises ValueError for more latent
        frames than the session is for.
        """
        self._missing -= latents.shape[2]
        if self._missing < 0:
            raise ValueError(f"latents: {latents.shape[2]} frames are {-self._missing} more than are missing")
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
        """The part of each frame that the strip is for."""
        layers, dim = self._vae.tail(), self._dim
        frames: list[Tensor] = []
        for feature in self._features:
            for frame in feed_through(layers, feature.narrow(dim, strip.low, strip.high - strip.low)):
                side = frame.shape[dim] // (strip.high - strip.low)
                piece = frame[0].narrow(dim, (strip.begin - strip.low) * side, (strip.end - strip.begin) * side)
                frames.append(piece.clamp(-1, 1).cpu())
        return frames


class WanVAE:
    """Encoder and decoder of one video at a time, for Diffusers' AutoencoderKLWan of Wan 2.1 and of Wan 2.2 5B.

    `decoding_bytes` bounds the memory of decoding beside the weights; None is the bound of the VAE's kind.
    """

    def __init__(self, vae: Any, decoding_bytes: int | None = None) -> None:
        is_residual = vae.config.is_residual
        self._vae = vae
        self._blocks = up_blocks(vae.decoder, is_residual=is_residual)
        self._patch_size: int = vae.config.patch_size or 1
        self._decoding_bytes = decoding_bytes or (RESIDUAL_DECODING_BYTES if is_residual else DECODING_BYTES)
        arrange_weights(vae.decoder)

    def encode(self, video: Tensor) -> Tensor:
        """The likeliest latents (1, z, latent frames, h, w) of a video (1, 3, frames, H, W) in [-1, 1]."""
        parameter = next(self._vae.parameters())
        latents: Tensor = self._vae.encode(video.to(parameter.device, parameter.dtype)).latent_dist.mode()
        return latents

    def session(self, num_latent_frames: int, height: int, width: int, *, concurrent: int = 1) -> DecodingSession:
        """Start decoding a video with latents of this height and width.

        `concurrent` videos of this size are decoded in turns: the bound holds for all of their caches together.
        """
        strips = self._strips(num_latent_frames, height, width, concurrent)
        return DecodingSession(self, num_latent_frames, strips, -1 if width >= height else -2)

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Frames (3, H, W) in [-1, 1], one by one, of latents (1, z, latent frames, h, w); see DecodingSession."""
        return self.session(*latents.shape[2:]).feed(latents)

    def head(self) -> list[FrameLayer]:
        """The layers at the latents' size, with empty caches."""
        return head_layers(self._vae.decoder)

    def tail(self) -> list[FrameLayer]:
        """The layers that upsample, with empty caches."""
        return tail_layers(self._vae.decoder, self._blocks, self._patch_size)

    def latent_frames(self, latents: Tensor) -> Iterator[Tensor]:
        """The input (1, z, h, w) of the first layer for each latent frame."""
        layout = torch.channels_last if latents.is_cuda else torch.contiguous_format
        for latent_frame in latents.tensor_split(latents.shape[2], dim=2):
            yield self._vae.post_quant_conv(latent_frame)[:, :, 0].contiguous(memory_format=layout)

    def _strips(self, num_latent_frames: int, height: int, width: int, concurrent: int) -> list[_Strip]:
        """As few equal parts of the longer side as fit the bound, one of them at least."""
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
            # Beyond this, what lies beside a strip outweighs it, and more strips would only cost time.
            if needed <= self._decoding_bytes or side // count <= costs.reach // 2:
                return strips
        return strips


def load_wan_vae(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> WanVAE:
    """Load Diffusers' AutoencoderKLWan. Raises CheckpointError."""
    return WanVAE(load_pretrained(checkpoint, name, device, dtype))
