"""The Wan video VAE, frame by frame.

Its convolutions are causal, so a frame can be decoded as soon as its latents are there. Diffusers' module decodes one
latent frame after the other too, but passes four frames at a time through the widest layers and keeps the whole
video; here each frame goes through all layers by itself, and a convolution keeps the two frames that it looks back at.
Weights and layers are Diffusers'; this is another walk through them, equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d

from common.errors import CheckpointError
from models.loader import load_pretrained

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint


class _Layer(Protocol):
    """Turns a stream of frames (1, C, 1, H, W) into another; it may return none, one or two for each."""

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """The frames that follow from one more."""


class _CausalConv:
    """A convolution over space, and over this frame and the ones before; before the first there are zeros."""

    def __init__(self, conv: Any) -> None:
        self._conv = conv
        time, height, width = conv.kernel_size
        self._padding = (0, height // 2, width // 2)
        self._past = time - 1
        self._history: list[Tensor] = []

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """One frame for one."""
        zeros = [torch.zeros_like(frame)] * (self._past - len(self._history))
        window = torch.cat((*zeros, *self._history, frame), dim=2) if self._past else frame
        if self._past:
            self._history = [*self._history, frame][-self._past :]
        yield conv3d(window, self._conv.weight, self._conv.bias, padding=self._padding)


class _Residual:
    """A residual block: norm, activation, convolution, twice, beside a shortcut."""

    def __init__(self, block: Any) -> None:
        self._block = block
        self._conv1, self._conv2 = _CausalConv(block.conv1), _CausalConv(block.conv2)

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """One frame for one."""
        block = self._block
        (hidden,) = self._conv1.feed(block.nonlinearity(block.norm1(frame)))
        (hidden,) = self._conv2.feed(block.nonlinearity(block.norm2(hidden)))
        yield hidden + block.conv_shortcut(frame)


class _PerFrame:
    """Modules that look at one frame at a time."""

    def __init__(self, *modules: Any) -> None:
        self._modules = modules

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """One frame for one."""
        for module in self._modules:
            frame = module(frame)
        yield frame


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
            yield self._space(frame[:, :, 0])[:, :, None]
            return
        (pair,) = self._time.feed(frame)
        for half in pair.chunk(2, dim=1):
            yield self._space(half[:, :, 0])[:, :, None]


def _decoder_layers(decoder: Any) -> list[_Layer]:
    """The decoder as a list, with empty histories."""
    layers: list[_Layer] = [_CausalConv(decoder.conv_in), _Residual(decoder.mid_block.resnets[0])]
    for attention, block in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
        if attention is not None:
            layers.append(_PerFrame(attention))
        layers.append(_Residual(block))
    for up in decoder.up_blocks:
        layers += [_Residual(block) for block in up.resnets]
        layers += [_Upsample(each) for each in up.upsamplers or ()]
    return [*layers, _PerFrame(decoder.norm_out, decoder.nonlinearity), _CausalConv(decoder.conv_out)]


def _run(layers: Sequence[_Layer], frame: Tensor) -> Iterator[Tensor]:
    """Take a frame through all layers before the next one is looked at."""
    if not layers:
        yield frame
        return
    for made in layers[0].feed(frame):
        yield from _run(layers[1:], made)


class WanVAE:
    """Encoder and decoder of one video at a time."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def encode(self, video: Tensor) -> Tensor:
        """The likeliest latents (1, z, latent frames, h, w) of a video (1, 3, frames, H, W) in [-1, 1]."""
        parameter = next(self._vae.parameters())
        latents: Tensor = self._vae.encode(video.to(parameter.device, parameter.dtype)).latent_dist.mode()
        return latents

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Frames (3, H, W) in [-1, 1], one by one, of latents (1, z, latent frames, h, w)."""
        layers = _decoder_layers(self._vae.decoder)
        for latent_frame in latents.tensor_split(latents.shape[2], dim=2):
            for frame in _run(layers, self._vae.post_quant_conv(latent_frame)):
                yield frame[0, :, 0].clamp(-1, 1)


def load_wan_vae(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> WanVAE:
    """Diffusers' AutoencoderKLWan, to be decoded by frames. Raises CheckpointError."""
    vae: nn.Module = load_pretrained(checkpoint, name, device, dtype)
    if vae.config.patch_size is not None or vae.config.is_residual:  # type: ignore[union-attr]
        raise CheckpointError(f"{name}: patch_size and is_residual belong to Wan 2.2's VAE, which is not supported")
    return WanVAE(vae)
