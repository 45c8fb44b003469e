"""Encodes pixels and sound into files: PNG, MP4. Pixels are float32 in [0, 1], sound in [-1, 1], on the CPU."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

PNG = "image/png"
MP4 = "video/mp4"
SAFETENSORS = "application/vnd.safetensors"

# Near enough to lossless for the eye; a fixed number of threads, because x264's bytes depend on it.
_X264_OPTIONS = {"crf": "17", "preset": "medium"}
_X264_THREADS = 4
_RECOMPRESSION_PRESET = "veryfast"
_BT709 = 1
_AAC_BITS = 192_000
_FRAMES_AHEAD = 8


def png_bytes(pixels: Tensor) -> bytes:
    """Encode RGB or RGBA, (channels, height, width); half values round to even, as Diffusers' do."""
    file = io.BytesIO()
    Image.fromarray(_bytes(pixels).numpy()).save(file, "PNG")
    return file.getvalue()


def recompressed(image: Image.Image, factor: int) -> Image.Image:
    """Compress an RGB image as one frame of an H.264 video, and decode it; a last odd row or column is cut.

    `factor` is x264's constant rate factor, from 1 (best) to 51. Models that were trained on frames of compressed
    videos expect its traces in an image. The number of threads is x264's own choice, as in Diffusers: tall images have
    slices for each, so that the result depends on the number of CPUs. Raises ValueError for less than 2 x 2 pixels.
    """
    width, height = (size // 2 * 2 for size in image.size)
    if not width or not height:
        raise ValueError(f"{image.width} x {image.height} pixels are too few to compress; at least 2 x 2 work")
    file = io.BytesIO()
    with av.open(file, mode="w", format="mp4") as container:
        options = {"crf": str(factor), "preset": _RECOMPRESSION_PRESET}
        stream: Any = container.add_stream("libx264", rate=1, options=options)
        stream.height, stream.width = height, width
        pixels = np.asarray(image.crop((0, 0, width, height)))
        frame: Any = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    with av.open(io.BytesIO(file.getvalue()), mode="r") as container:
        return Image.fromarray(next(container.decode(video=0)).to_ndarray(format="rgb24"))


class _Reread:
    """Reads a file in memory at a position of its own, as a second handle of a file on disk would."""

    def __init__(self, file: io.BytesIO) -> None:
        self._file = file
        self._position = 0

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        with self._file.getbuffer() as data:
            read = bytes(data[self._position : self._position + size])
        self._position += len(read)
        return read

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset from the start, the position or the end."""
        with self._file.getbuffer() as data:
            base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(data)}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def close(self) -> None:
        """Keep the file, which is still written to."""


@dataclass(frozen=True)
class Sound:
    """Samples (channels, samples), one channel or two; `rate` of them a second."""

    samples: Tensor
    rate: int


class Mp4File:
    """An H.264 video in memory, 4:2:0 in BT.709, its index before the frames. Height and width are even.

    With a sound it has an AAC track, whose packets lie among the frames that are shown at their time.
    """

    def __init__(self, height: int, width: int, frame_rate: float, sound: Sound | None = None) -> None:
        self._file = io.BytesIO()
        # The muxer moves the frames behind the index at the end, for which it opens the file again, to read.
        self._container = av.open(
            self._file,
            mode="w",
            format="mp4",
            container_options={"movflags": "+faststart"},
            io_open=lambda *_: _Reread(self._file),
        )
        stream: Any = self._container.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options, stream.codec_context.thread_count = _X264_OPTIONS, _X264_THREADS
        stream.codec_context.colorspace = stream.codec_context.color_primaries = _BT709
        stream.codec_context.color_trc = _BT709
        self._stream = stream
        self._sound: deque[av.Packet[Any]] = deque()
        if sound is not None:
            self._sound.extend(self._encode_sound(sound))

    def add(self, pixels: Tensor) -> None:
        """Append a frame (3, height, width)."""
        frame: Any = av.VideoFrame.from_ndarray(_bytes(pixels).numpy(), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        self._mux(self._stream.encode(frame))

    def finish(self) -> bytes:
        """End the file and return it."""
        self._mux(self._stream.encode(None))
        while self._sound:
            self._container.mux(self._sound.popleft())
        self._container.close()
        return self._file.getvalue()

    def _mux(self, packets: Iterable[av.Packet[Any]]) -> None:
        """Append packets of the video, each behind the sound up to its time."""
        for packet in packets:
            while self._sound and _seconds(self._sound[0]) <= _seconds(packet):
                self._container.mux(self._sound.popleft())
            self._container.mux(packet)

    def _encode_sound(self, sound: Sound) -> list[av.Packet[Any]]:
        layout = "mono" if len(sound.samples) == 1 else "stereo"
        stream: Any = self._container.add_stream("aac", rate=sound.rate, layout=layout)
        stream.bit_rate, stream.codec_context.thread_count = _AAC_BITS, 1
        frame: Any = av.AudioFrame.from_ndarray(sound.samples.numpy(), format="fltp", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = sound.rate, Fraction(1, sound.rate), 0
        return [*stream.encode(frame), *stream.encode(None)]


def _seconds(packet: av.Packet[Any]) -> Fraction:
    """When a packet is decoded."""
    assert packet.dts is not None, "an encoder's packets have times"
    assert packet.time_base is not None, "an encoder's packets have times"
    return packet.dts * packet.time_base


@contextmanager
def encoding_ahead(file: Mp4File) -> Iterator[_Ahead]:
    """Append frames on a thread of its own, so that the next ones are made meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="mp4") as executor:
        ahead = _Ahead(file, executor)
        yield ahead
        ahead.wait(0)


class _Ahead:
    """Hands frames to the thread, and waits when it falls behind. Errors of the encoder are raised here."""

    def __init__(self, file: Mp4File, executor: ThreadPoolExecutor) -> None:
        self._file = file
        self._executor = executor
        self._pending: deque[Future[None]] = deque()

    def add(self, pixels: Tensor) -> None:
        """Append a frame, now or soon."""
        self._pending.append(self._executor.submit(self._file.add, pixels))
        self.wait(_FRAMES_AHEAD)

    def wait(self, pending: int) -> None:
        """Until no more than so many frames wait."""
        while len(self._pending) > pending:
            self._pending.popleft().result()


def mp4_bytes(
    frames: Iterable[Tensor], height: int, width: int, frame_rate: float, sound: Sound | None = None
) -> bytes:
    """Encode frames (3, height, width) while they come."""
    file = Mp4File(height, width, frame_rate, sound)
    with encoding_ahead(file) as ahead:
        for frame in frames:
            ahead.add(frame)
    return file.finish()


def _bytes(pixels: Tensor) -> Tensor:
    return (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous()
