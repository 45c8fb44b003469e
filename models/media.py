"""Encodes pixels and audio as PNG and MP4 files. Pixels are float32 in [0, 1], audio in [-1, 1], on the CPU."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

PNG = "image/png"
MP4 = "video/mp4"
SAFETENSORS = "application/vnd.safetensors"

# Visually near-lossless and reproducible. Macroblock-tree rate control (mbtree) is off because on AVX-512 CPUs it
# changes the bytes of about one in 2,000 encodings (x264 165).
_X264_OPTIONS = {"crf": "17", "preset": "medium", "mbtree": "0"}
# Fixed, because x264's output depends on the number of threads.
_X264_THREADS = 4
# No B-frames: players differ in handling frames whose presentation order is not the decoding order.
_FRAGMENT_OPTIONS = {**_X264_OPTIONS, "bf": "0"}
# An empty index, then one fragment for each IDR frame; timestamps are relative to the whole video.
_FRAGMENT_MUXING = {
    "movflags": "+empty_moov+frag_keyframe+default_base_moof+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",
}
_BOX_HEADER_BYTES = 8
_RECOMPRESSION_PRESET = "veryfast"
_BT709 = 1
_AAC_BITS_PER_SECOND = 192_000
_MAX_PENDING_CALLS = 8

_T = TypeVar("_T")


def png_bytes(pixels: Tensor) -> bytes:
    """Encode RGB or RGBA pixels (channels, height, width); halves round to even, as in Diffusers."""
    file = io.BytesIO()
    Image.fromarray(_bytes(pixels).numpy()).save(file, "PNG")
    return file.getvalue()


def recompressed(image: Image.Image, factor: int) -> Image.Image:
    """Encode an RGB image as a one-frame H.264 video and decode it; an odd last row or column is dropped.

    Models trained on frames of compressed videos expect compression artifacts in their input image. `factor` is x264's
    constant rate factor, from 1 (best) to 51. As in Diffusers, x264 chooses the number of threads; tall images have one
    slice per thread, so that the result depends on the number of CPUs. Raises ValueError for fewer than 2 x 2 pixels.
    """
    width, height = (size // 2 * 2 for size in image.size)
    if not width or not height:
        raise ValueError(f"{image.width} x {image.height} pixels are not enough to compress; 2 x 2 or more work")
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


class _SecondHandle:
    """Second read handle of an in-memory file, with its own position."""

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
        """Do nothing: the in-memory file is still being written."""


@dataclass(frozen=True)
class Audio:
    """Audio samples (channels, samples), mono or stereo, and their rate in Hz."""

    samples: Tensor
    rate: int


class Mp4File:
    """In-memory MP4 with H.264 video (4:2:0, BT.709, even height and width) and AAC audio.

    The index precedes the data. Audio packets are interleaved with the frames of the same time.
    """

    def __init__(self, height: int, width: int, frame_rate: float, audio: Audio) -> None:
        self._file = io.BytesIO()
        # To put the index first, the muxer opens the file a second time, for reading.
        self._container = av.open(
            self._file,
            mode="w",
            format="mp4",
            container_options={"movflags": "+faststart"},
            io_open=lambda *_: _SecondHandle(self._file),
        )
        self._stream = _add_h264(self._container, height, width, frame_rate, _X264_OPTIONS)
        self._audio = deque(self._encode_audio(audio))

    def add(self, pixels: Tensor) -> None:
        """Append a frame (3, height, width)."""
        self._mux(self._stream.encode(_yuv_frame(pixels)))

    def finish(self) -> bytes:
        """Finish the file and return its bytes."""
        self._mux(self._stream.encode(None))
        while self._audio:
            self._container.mux(self._audio.popleft())
        self._container.close()
        return self._file.getvalue()

    def _mux(self, packets: Iterable[av.Packet[Any]]) -> None:
        """Append video packets; audio packets up to the same time come first."""
        for packet in packets:
            while self._audio and _seconds(self._audio[0]) <= _seconds(packet):
                self._container.mux(self._audio.popleft())
            self._container.mux(packet)

    def _encode_audio(self, audio: Audio) -> list[av.Packet[Any]]:
        layout = "mono" if len(audio.samples) == 1 else "stereo"
        stream: Any = self._container.add_stream("aac", rate=audio.rate, layout=layout)
        stream.bit_rate, stream.codec_context.thread_count = _AAC_BITS_PER_SECOND, 1
        frame: Any = av.AudioFrame.from_ndarray(audio.samples.numpy(), format="fltp", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = audio.rate, Fraction(1, audio.rate), 0
        return [*stream.encode(frame), *stream.encode(None)]


def _seconds(packet: av.Packet[Any]) -> Fraction:
    """Decoding time of a packet, in seconds."""
    assert packet.dts is not None, "encoded packets have timestamps"
    assert packet.time_base is not None, "encoded packets have timestamps"
    return packet.dts * packet.time_base


class Mp4Fragment:
    """Consecutive frames of a fragmented MP4 video (ISO/IEC 14496-12, 8.8); height and width are even.

    `first_frame` is the index of the first frame in the video. The file is the concatenation of all fragments in order;
    the first fragment begins with the index (ftyp and moov). Each fragment has its own encoder and starts with an IDR
    frame, so that its bytes depend only on its frames, their index, the size and the frame rate.
    """

    def __init__(self, height: int, width: int, frame_rate: float, first_frame: int) -> None:
        self._file = io.BytesIO()
        # Sequence numbers must increase, but may skip values.
        options = {**_FRAGMENT_MUXING, "fragment_index": str(first_frame + 1)}
        self._container = av.open(self._file, mode="w", format="mp4", container_options=options)
        self._stream = _add_h264(self._container, height, width, frame_rate, _FRAGMENT_OPTIONS)
        self._has_index = first_frame == 0
        self._next_frame = first_frame

    def add(self, pixels: Tensor) -> None:
        """Append a frame (3, height, width)."""
        frame = _yuv_frame(pixels)
        frame.pts, frame.time_base = self._next_frame, 1 / self._stream.codec_context.framerate
        self._container.mux(self._stream.encode(frame))
        self._next_frame += 1

    def finish(self) -> bytes:
        """Finish the fragment, which has at least one frame, and return its bytes."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        data = self._file.getvalue()
        return data if self._has_index else data[_offset_of(b"moof", data) :]


def _offset_of(kind: bytes, data: bytes) -> int:
    """Byte offset of the first top-level box of a type. Raises ValueError if there is none."""
    offset = 0
    while offset + _BOX_HEADER_BYTES <= len(data):
        if data[offset + 4 : offset + _BOX_HEADER_BYTES] == kind:
            return offset
        offset += int.from_bytes(data[offset : offset + 4])
    raise ValueError(f"MP4: {kind!r} is not among the boxes")


def _add_h264(
    container: av.container.OutputContainer, height: int, width: int, frame_rate: float, options: dict[str, str]
) -> Any:
    """Add a video track, 4:2:0 in BT.709. The frame rate is rounded to a fraction with a denominator up to 1001."""
    stream: Any = container.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1001))
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    stream.options, stream.codec_context.thread_count = options, _X264_THREADS
    stream.codec_context.colorspace = stream.codec_context.color_primaries = _BT709
    stream.codec_context.color_trc = _BT709
    return stream


def _yuv_frame(pixels: Tensor) -> Any:
    frame: Any = av.VideoFrame.from_ndarray(_bytes(pixels).numpy(), format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace="ITU709")


class EncodingAhead:
    """Runs encoder calls in order on a thread, concurrently with the decoding of later frames.

    The methods submit() and wait() raise the errors of earlier calls.
    """

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor
        self._pending: deque[Future[Any]] = deque()

    def submit(self, work: Callable[..., _T], *args: object) -> Future[_T]:
        """Queue a call. Blocks while more than eight calls are pending."""
        future = self._executor.submit(work, *args)
        self._pending.append(future)
        self.wait(_MAX_PENDING_CALLS)
        return future

    def wait(self, pending: int = 0) -> None:
        """Block until at most `pending` calls are pending."""
        while len(self._pending) > pending:
            self._pending.popleft().result()


@contextmanager
def encoding_ahead() -> Iterator[EncodingAhead]:
    """Start an encoder thread. On exit, wait for pending calls; after an error, cancel the pending calls."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="mp4")
    try:
        ahead = EncodingAhead(executor)
        yield ahead
        ahead.wait()
    finally:
        executor.shutdown(cancel_futures=True)


def mp4_bytes(frames: Iterable[Tensor], height: int, width: int, frame_rate: float, audio: Audio) -> bytes:
    """Encode frames (3, height, width) with audio, concurrently with the iteration over `frames`."""
    file = Mp4File(height, width, frame_rate, audio)
    with encoding_ahead() as ahead:
        for frame in frames:
            ahead.submit(file.add, frame)
    return file.finish()


def _bytes(pixels: Tensor) -> Tensor:
    return (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous()
