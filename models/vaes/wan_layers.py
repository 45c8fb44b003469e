"""Layers of the Wan VAE decoder that process one frame at a time and cache previous frames.

Each class wraps a module of Diffusers' AutoencoderKLWan. The decoder of Wan 2.2's VAE (`is_residual`) differs in its up
blocks, which add a shortcut from their input to their output, and in `patch_size`: its last convolution returns a
square of pixels as channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pixel_shuffle

from models.kernels.channel_norm import channel_norm_silu


class FrameLayer(Protocol):
    """Maps a stream of frames (1, C, H, W) to another stream; each input frame yields one or two frames."""

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """Yield the output frames of the next input frame."""


def feed_through(layers: Sequence[FrameLayer], frame: Tensor) -> Iterator[Tensor]:
    """Pass a frame through all layers depth first, so that few frames are in memory at once."""
    if not layers:
        yield frame
        return
    for made in layers[0].feed(frame):
        yield from feed_through(layers[1:], made)


@dataclass(frozen=True)
class UpBlock:
    """The modules of a Diffusers up block, with the same names for WanUpBlock and WanResidualUpBlock."""

    resnets: Sequence[Any]
    resample: Any | None
    shortcut: Any | None


def up_blocks(decoder: Any, *, is_residual: bool) -> list[UpBlock]:
    """The up blocks of Diffusers' WanDecoder3d, from the lowest resolution."""
    if is_residual:
        return [UpBlock(block.resnets, block.upsampler, block.avg_shortcut) for block in decoder.up_blocks]
    return [UpBlock(block.resnets, (block.upsamplers or (None,))[0], None) for block in decoder.up_blocks]


def arrange_weights(decoder: Any) -> None:
    """Add to each 3D convolution the buffer `window`: its weight in 2D, for frames stacked as channels.

    The 2D weight (out, frames * in, h, w) and the 3D weight (out, in, frames, h, w) share memory. On CUDA the 2D weight
    is channels-last.
    """
    for module in decoder.modules():
        if isinstance(module, nn.Conv3d):
            window = module.weight.data.transpose(1, 2).flatten(1, 2)
            if window.is_cuda:
                window = window.contiguous(memory_format=torch.channels_last)
            module.register_buffer("window", window, persistent=False)
            frames = module.kernel_size[0]
            module.weight.data = window.view(len(window), frames, -1, *window.shape[2:]).transpose(1, 2)


def head_layers(decoder: Any) -> list[FrameLayer]:
    """The layers at the latents' resolution, with empty caches. Attention is over the whole frame."""
    mid = decoder.mid_block
    layers: list[FrameLayer] = [_CausalConv(decoder.conv_in), _Residual(mid.resnets[0])]
    for attention, block in zip(mid.attentions, mid.resnets[1:], strict=True):
        if attention is not None:
            layers.append(_PerFrame(attention))
        layers.append(_Residual(block))
    return layers


def tail_layers(decoder: Any, blocks: Sequence[UpBlock], patch_size: int) -> list[FrameLayer]:
    """The upsampling layers, with empty caches. Their receptive field is bounded."""
    layers: list[FrameLayer] = []
    for block in blocks:
        layers += _up_layers(block) if block.shortcut is None else [_ShortcutUp(block)]
    layers += [_Activation(decoder.norm_out), _CausalConv(decoder.conv_out)]
    if patch_size > 1:
        layers.append(_Unpatchify(patch_size))
    return layers


def _up_layers(block: UpBlock) -> list[FrameLayer]:
    layers: list[FrameLayer] = [_Residual(resnet) for resnet in block.resnets]
    if block.resample is not None:
        layers.append(_Upsample(block.resample))
    return layers


class _CausalConv:
    """Causal 3D convolution over the current and previous frames; zeros precede the first frame.

    A window of frames results in one frame. The window's frames are stacked as channels of one image and convolved in
    2D, because 2D kernels are much faster than 3D kernels for three frames.
    """

    def __init__(self, conv: Any) -> None:
        time, height, width = conv.kernel_size
        self._weight = conv.window
        self._bias = conv.bias
        self._padding = (height // 2, width // 2)
        self._past = time - 1
        self._history: list[Tensor] = []

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """Yield one frame. `frame` is cached: the caller must not modify it afterwards."""
        window = frame
        if self._past:
            missing = self._past - len(self._history)
            window = torch.cat((*[torch.zeros_like(frame)] * missing, *self._history, frame), dim=1)
            self._history = [*self._history, frame][-self._past :]
        yield conv2d(window, self._weight, self._bias, padding=self._padding)


class _Residual:
    """A residual block: two sequences of norm, activation and convolution, and a shortcut."""

    def __init__(self, block: Any) -> None:
        self._norm1, self._norm2 = block.norm1, block.norm2
        self._conv1, self._conv2 = _CausalConv(block.conv1), _CausalConv(block.conv2)
        has_shortcut = block.conv1.in_channels != block.conv2.out_channels
        self._shortcut = _CausalConv(block.conv_shortcut) if has_shortcut else None

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """Yield one frame. Intermediate tensors are freed before the next layers run."""
        yield self._forward(frame)

    def _forward(self, frame: Tensor) -> Tensor:
        (hidden,) = self._conv1.feed(_norm_silu(frame, self._norm1))
        (hidden,) = self._conv2.feed(_norm_silu(hidden, self._norm2))
        if self._shortcut is not None:
            (frame,) = self._shortcut.feed(frame)
        return hidden.add_(frame)


class _PerFrame:
    """A Diffusers module that processes each frame independently, called with a video of one frame."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """Yield one frame."""
        yield self._module(frame[:, :, None])[:, :, 0]


class _Activation:
    """Norm and activation before the last convolution."""

    def __init__(self, norm: Any) -> None:
        self._norm = norm

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """Yield one frame."""
        yield _norm_silu(frame, self._norm)


def _norm_silu(frame: Tensor, norm: Any) -> Tensor:
    """Channel-wise RMS norm with weight, then SiLU."""
    return channel_norm_silu(frame, norm.gamma.flatten(), norm.scale)


class _Upsample:
    """Doubles height and width. With a time convolution, every frame but the first becomes two frames."""

    def __init__(self, resample: Any) -> None:
        self._space = resample.resample
        self._time = _CausalConv(resample.time_conv) if resample.mode == "upsample3d" else None
        self._first = True

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """Yield one frame or two frames, which share no memory with `frame`."""
        if self._time is None or self._first:
            self._first = False
            yield self._space(frame)
            return
        (pair,) = self._time.feed(frame)
        for half in pair.chunk(2, dim=1):
            yield self._space(half)


class _ShortcutUp:
    """WanResidualUpBlock: residual blocks and upsampling, plus a shortcut from channels to time and space.

    The shortcut (DupUp3D) repeats the input channels, and rearranges them to (out channels, frames, rows, columns). For
    the first input frame, only the last frame of the shortcut is used, because the main path yields one frame.
    """

    def __init__(self, block: UpBlock) -> None:
        self._main = _up_layers(block)
        shortcut: Any = block.shortcut
        self._scale = shortcut.factor_s
        total = shortcut.out_channels * shortcut.factor
        source = torch.arange(total, device=block.resnets[0].conv1.weight.device) // shortcut.repeats
        self._sources = source.view(shortcut.out_channels, shortcut.factor_t, -1).transpose(0, 1).flatten(1)
        self._first = True

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """Yield one frame or two frames."""
        sources = self._sources[-1:] if self._first else self._sources
        self._first = False
        for source, made in zip(sources, feed_through(self._main, frame), strict=True):
            yield made.add_(pixel_shuffle(frame.index_select(1, source), self._scale))


class _Unpatchify:
    """Rearranges channels (color, column, row) to pixels: (1, C * p², H, W) to (1, C, H * p, W * p)."""

    def __init__(self, patch_size: int) -> None:
        self._patch_size = patch_size

    def feed(self, frame: Tensor) -> Iterator[Tensor]:
        """Yield one frame."""
        side = self._patch_size
        patches = frame.view(1, -1, side, side, *frame.shape[2:]).transpose(2, 3)
        yield pixel_shuffle(patches.flatten(1, 3), side)
