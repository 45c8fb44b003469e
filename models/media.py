"""Encodes pixels into files: PNG, MP4. Pixels are float32 in [0, 1], on the CPU."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import av
import torch
from PIL import Image
from torch import Tensor

PNG = "image/png"
MP4 = "video/mp4"
SAFETENSORS = "application/vnd.safetensors"

# Near enough to lossless for the eye; a fixed number of threads, because x264's bytes depend on it.
_X264_OPTIONS = {"crf": "17", "preset": "medium"}
_X264_THREADS = 4
_BT709 = 1
_FRAMES_AHEAD = 8


def png_bytes(pixels: Tensor) -> bytes:
    """Encode (3, height, width); half values round to even, as Diffusers' do."""
    file = io.BytesIO()
    Image.fromarray(_rgb(pixels).numpy()).save(file, "PNG")
    return file.getvalue()


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


class Mp4File:
    """An H.264 video in memory, 4:2:0 in BT.709, its index before the frames. Height and width are even."""

    def __init__(self, height: int, width: int, frame_rate: float) -> None:
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

    def add(self, pixels: Tensor) -> None:
        """Append a frame (3, height, width)."""
        frame: Any = av.VideoFrame.from_ndarray(_rgb(pixels).numpy(), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> bytes:
        """End the file and return it."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._file.getvalue()


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


def mp4_bytes(frames: Iterable[Tensor], height: int, width: int, frame_rate: float) -> bytes:
    """Encode frames (3, height, width) while they come."""
    file = Mp4File(height, width, frame_rate)
    with encoding_ahead(file) as ahead:
        for frame in frames:
            ahead.add(frame)
    return file.finish()


def _rgb(pixels: Tensor) -> Tensor:
    return (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous()
