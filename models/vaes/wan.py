"""The Wan video VAE, frame by frame, in bounded memory.

Its convolutions are causal, so a frame can be decoded as soon as its latents are there. Diffusers' module decodes one
latent frame after the other too, but passes four frames at a time through the widest layers and keeps the whole
video; here each frame goes through all layers by itself, and a convolution keeps the two frames that it looks back at.
Where even these are too much, the picture is decoded in strips, each wide enough that no pixel of it misses what it
depends on. Weights and layers are Diffusers'; this is another walk through them, equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, normalize, silu

from common.errors import CheckpointError
from models.layers.backend import kernels_for
from models.loader import load_pretrained

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint

DECODING_BYTES = 3_750_000_000
"""What decoding may take beside the weights: with workspaces of convolutions, which cannot be told before, 4 GB."""

# Frames of the widest layer that are alive at a time beside the histories, with all that a residual block makes of one.
_FRAMES_AT_WORK = 12


class _Layer(Protocol):
    """Turns a stream of frames (1, C, H, W) into another; it may return none, one or two for each."""

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """The frames that follow from one more."""


class _CausalConv:
    """A convolution over space, and over this frame and the ones before; before the first there are zeros.

    Of a window of frames one frame comes out, so it is a convolution of a picture that has the window's channels:
    libraries have far better kernels for that than for a video of three frames.
    """

    def __init__(self, conv: Any) -> None:
        time, height, width = conv.kernel_size
        self._weight = conv.window
        self._bias = conv.bias
        self._padding = (height // 2, width // 2)
        self._past = time - 1
        self._history: list[Tensor] = []

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """One frame for one. It is kept: nobody may change it afterwards."""
        window = frame
        if self._past:
            missing = self._past - len(self._history)
            window = torch.cat((*[torch.zeros_like(frame)] * missing, *self._history, frame), dim=1)
            self._history = [*self._history, frame][-self._past :]
        yield conv2d(window, self._weight, self._bias, padding=self._padding)


def _arrange(decoder: Any) -> None:
    """Give each convolution its weight (out, in, frames, h, w) as one over a window: (out, frames * in, h, w).

    The two share memory, in which CUDA's convolutions find the channels of a window adjacent.
    """
    for module in decoder.modules():
        if isinstance(module, nn.Conv3d):
            window = module.weight.data.transpose(1, 2).flatten(1, 2)
            if window.is_cuda:
                window = window.contiguous(memory_format=torch.channels_last)
            module.register_buffer("window", window, persistent=False)
            frames = module.kernel_size[0]
            module.weight.data = window.view(len(window), frames, -1, *window.shape[2:]).transpose(1, 2)


class _Residual:
    """A residual block: norm, activation, convolution, twice, beside a shortcut."""

    def __init__(self, block: Any) -> None:
        self._norm1, self._norm2 = block.norm1, block.norm2
        self._conv1, self._conv2 = _CausalConv(block.conv1), _CausalConv(block.conv2)
        has_shortcut = block.conv1.in_channels != block.conv2.out_channels
        self._shortcut = _CausalConv(block.conv_shortcut) if has_shortcut else None

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """One frame for one. While the next layers work on it, no intermediate tensor is alive."""
        yield self._made_of(frame)

    def _made_of(self, frame: Tensor) -> Tensor:
        (hidden,) = self._conv1.feed(_norm_silu(frame, self._norm1))
        (hidden,) = self._conv2.feed(_norm_silu(hidden, self._norm2))
        if self._shortcut is not None:
            (frame,) = self._shortcut.feed(frame)
        return hidden.add_(frame)


class _PerFrame:
    """A module of Diffusers' that looks at one frame at a time, as a video of one."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """One frame for one."""
        yield self._module(frame[:, :, None])[:, :, 0]


class _Activation:
    """Norm and activation before the last convolution."""

    def __init__(self, norm: Any) -> None:
        self._norm = norm

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """One frame for one."""
        yield _norm_silu(frame, self._norm)


def _norm_silu(frame: Tensor, norm: Any) -> Tensor:
    """Each pixel's channels divided by their root mean square, times a weight, through SiLU."""
    if (kernels := kernels_for(frame)) is not None:
        activated: Tensor = kernels.channel_norm_silu(frame, norm.gamma.flatten())
        return activated
    normed = normalize(frame.float(), dim=1).to(frame.dtype)
    return silu(normed * norm.scale * norm.gamma.view(-1, 1, 1), inplace=True)


class _Upsample:
    """Doubles rows and columns; with a time convolution, frames too: all but the first, which stands for itself."""

    def __init__(self, resample: Any) -> None:
        self._space = resample.resample
        self._time = _CausalConv(resample.time_conv) if resample.mode == "upsample3d" else None
        self._first = True

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """One frame, or two."""
        if self._time is None or self._first:
            self._first = False
            yield self._space(frame)
            return
        (pair,) = self._time.feed(frame)
        for half in pair.chunk(2, dim=1):
            yield self._space(half)


def _head(decoder: Any) -> list[_Layer]:
    """The layers at the latents' own size, of which one looks at the whole frame. Histories are empty."""
    mid = decoder.mid_block
    layers: list[_Layer] = [_CausalConv(decoder.conv_in), _Residual(mid.resnets[0])]
    for attention, block in zip(mid.attentions, mid.resnets[1:], strict=True):
        if attention is not None:
            layers.append(_PerFrame(attention))
        layers.append(_Residual(block))
    return layers


def _tail(decoder: Any) -> list[_Layer]:
    """The layers that enlarge, all of which look at neighbours only. Histories are empty."""
    layers: list[_Layer] = []
    for up in decoder.up_blocks:
        layers += [_Residual(block) for block in up.resnets]
        layers += [_Upsample(each) for each in up.upsamplers or ()]
    return [*layers, _Activation(decoder.norm_out), _CausalConv(decoder.conv_out)]


def _run(layers: Sequence[_Layer], frame: Tensor) -> Iterator[Tensor]:
    """Take a frame through all layers before the next one is looked at."""
    if not layers:
        yield frame
        return
    for made in layers[0].feed(frame):
        yield from _run(layers[1:], made)


def _decoder_costs(decoder: Any) -> tuple[int, int]:
    """Values that the tail keeps and works on per latent pixel, and its reach: latent pixels that a pixel depends on.

    A convolution keeps two frames and reaches one pixel further, at the size that it works at.
    """
    values, widest, reach, scale = 0, 0, 0.0, 1
    for up in decoder.up_blocks:
        for block in up.resnets:
            values += 2 * (block.conv1.in_channels + block.conv2.in_channels) * scale**2
            widest = max(widest, block.conv2.out_channels * scale**2)
            reach += 2 / scale
        for each in up.upsamplers or ():
            values += 2 * each.time_conv.in_channels * scale**2 if each.mode == "upsample3d" else 0
            widest = max(widest, 2 * each.resample[1].in_channels * scale**2)
            scale *= 2
            reach += 1 / scale
    values += 2 * decoder.conv_out.in_channels * scale**2
    return values + _FRAMES_AT_WORK * widest, int(reach + 1 / scale) + 1


@dataclass(frozen=True)
class _Strip:
    """Rows or columns of latents: those that are wanted, and those that are decoded because the former look at them."""

    begin: int
    end: int
    low: int
    high: int


def _longer_side(latents: Tensor) -> int:
    return -1 if latents.shape[-1] >= latents.shape[-2] else -2


class WanVAE:
    """Encoder and decoder of one video at a time; `decoding_bytes` bounds what decoding takes beside the weights."""

    def __init__(self, vae: Any, decoding_bytes: int = DECODING_BYTES) -> None:
        self._vae = vae
        self._decoding_bytes = decoding_bytes
        _arrange(vae.decoder)

    def encode(self, video: Tensor) -> Tensor:
        """The likeliest latents (1, z, latent frames, h, w) of a video (1, 3, frames, H, W) in [-1, 1]."""
        parameter = next(self._vae.parameters())
        latents: Tensor = self._vae.encode(video.to(parameter.device, parameter.dtype)).latent_dist.mode()
        return latents

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Frames (3, H, W) in [-1, 1], one by one, of latents (1, z, latent frames, h, w).

        In one piece they come while the rest is decoded; in strips all come at the end, on the CPU.
        """
        decoder = self._vae.decoder
        strips = self._strips(latents)
        if len(strips) == 1:
            layers = [*_head(decoder), *_tail(decoder)]
            for latent_frame in self._latent_frames(latents):
                for frame in _run(layers, latent_frame):
                    yield frame[0].clamp(-1, 1)
            return
        head, dim = _head(decoder), _longer_side(latents)
        features = [frame for each in self._latent_frames(latents) for frame in _run(head, each)]
        pieces = [self._strip(features, strip, dim) for strip in strips]
        for parts in zip(*pieces, strict=True):
            yield torch.cat(parts, dim=dim)

    def _latent_frames(self, latents: Tensor) -> Iterator[Tensor]:
        layout = torch.channels_last if latents.is_cuda else torch.contiguous_format
        for latent_frame in latents.tensor_split(latents.shape[2], dim=2):
            yield self._vae.post_quant_conv(latent_frame)[:, :, 0].contiguous(memory_format=layout)

    def _strip(self, features: Sequence[Tensor], strip: _Strip, dim: int) -> list[Tensor]:
        """The part of each frame that the strip is for."""
        layers = _tail(self._vae.decoder)
        frames: list[Tensor] = []
        for feature in features:
            for frame in _run(layers, feature.narrow(dim, strip.low, strip.high - strip.low)):
                side = frame.shape[dim] // (strip.high - strip.low)
                piece = frame[0].narrow(dim, (strip.begin - strip.low) * side, (strip.end - strip.begin) * side)
                frames.append(piece.clamp(-1, 1).cpu())
        return frames

    def _strips(self, latents: Tensor) -> list[_Strip]:
        """As few equal parts of the longer side as fit the bound, one of them at least."""
        values, reach = _decoder_costs(self._vae.decoder)
        side, across = latents.shape[_longer_side(latents)], min(latents.shape[-2:])
        item = latents.element_size()
        features = latents.shape[2] * self._vae.decoder.conv_in.out_channels * side * across * item
        strips: list[_Strip] = []
        for count in range(1, side + 1):
            edges = [side * i // count for i in range(count + 1)]
            strips = [
                _Strip(begin, end, max(begin - reach, 0), min(end + reach, side)) for begin, end in pairwise(edges)
            ]
            widest = max(strip.high - strip.low for strip in strips)
            needed = widest * across * values * item + (features if count > 1 else 0)
            # Beyond this, what lies beside a strip outweighs it, and more strips would only cost time.
            if needed <= self._decoding_bytes or side // count <= reach // 2:
                return strips
        return strips


def load_wan_vae(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> WanVAE:
    """Diffusers' AutoencoderKLWan, to be decoded by frames. Raises CheckpointError."""
    vae = load_pretrained(checkpoint, name, device, dtype)
    if vae.config.patch_size is not None or vae.config.is_residual:
        raise CheckpointError(f"{name}: patch_size and is_residual belong to Wan 2.2's VAE, which is not supported")
    return WanVAE(vae)
