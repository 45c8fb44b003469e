"""MP4 fragments: concatenated they are one playable file, and each has reproducible bytes."""

from __future__ import annotations

import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from models.media import Mp4Fragment
from mp4_boxes import box, box_types, boxes, x264_options

HEIGHT, WIDTH = 48, 80
COUNTS = (9, 12, 1, 3, 30)
"""Number of frames per fragment; one fragment has a single frame."""
TOTAL = sum(COUNTS)
FIRSTS = [sum(COUNTS[:index]) for index in range(len(COUNTS))]
"""Index of the first frame of each fragment."""


def video_frame(index: int) -> Tensor:
    """Frame of a smooth video (3, HEIGHT, WIDTH); the blue channel encodes the index."""
    rows, columns = torch.meshgrid(torch.linspace(0, 6, HEIGHT), torch.linspace(0, 9, WIDTH), indexing="ij")
    red, green = (0.5 + 0.5 * torch.sin(each + index / 7) for each in (rows, columns))
    return torch.stack([red, green, torch.full_like(red, index / TOTAL)])


def fragment(first: int, count: int, frame_rate: float = 16.0) -> bytes:
    encoder = Mp4Fragment(HEIGHT, WIDTH, frame_rate, first)
    for index in range(first, first + count):
        encoder.add(video_frame(index))
    return encoder.finish()


@pytest.fixture(scope="module")
def fragments() -> list[bytes]:
    return [fragment(*each) for each in zip(FIRSTS, COUNTS, strict=True)]


def check_playable(file: bytes, count: int, frame_rate: Fraction) -> None:
    """Assert that all frames are decoded in order, with equal durations and the encoded colors."""
    with av.open(io.BytesIO(file), mode="r", options={"err_detect": "explode"}) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == frame_rate
        assert (stream.codec_context.colorspace, stream.codec_context.color_primaries) == (1, 1)
        assert stream.codec_context.color_trc == 1
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert stream.time_base is not None
        assert [(packet.duration or 0) * stream.time_base for packet in packets] == [1 / frame_rate] * count
        assert (stream.duration or 0) * stream.time_base == count / frame_rate
        assert all(packet.dts == packet.pts for packet in packets)
    with av.open(io.BytesIO(file), mode="r", options={"err_detect": "explode"}) as container:
        decoded = list(container.decode(video=0))
        times = [(frame.pts or 0) * Fraction(frame.time_base or 0) for frame in decoded]
        assert times == [index / frame_rate for index in range(count)]
        for index in (0, count // 2, count - 1):
            pixels = decoded[index].to_ndarray(format="rgb24").astype(np.float64) / 255
            assert np.abs(pixels.transpose(2, 0, 1) - video_frame(index).double().numpy()).mean() < 0.02


def test_the_concatenated_fragments_are_one_file(fragments: list[bytes]) -> None:
    file = b"".join(fragments)
    check_playable(file, TOTAL, Fraction(16))
    assert box_types(file) == ["ftyp", "moov", *["moof", "mdat"] * len(COUNTS)]
    moofs = [content for kind, content in boxes(file) if kind == "moof"]
    numbers = [int.from_bytes(box(moof, "mfhd")[4:]) for moof in moofs]
    assert numbers == sorted(set(numbers))
    scale = int.from_bytes(box(file, "moov", "trak", "mdia", "mdhd")[12:16])
    times = [Fraction(int.from_bytes(box(moof, "traf", "tfdt")[4:]), scale) for moof in moofs]
    assert times == [Fraction(first, 16) for first in FIRSTS]


def test_each_prefix_of_fragments_is_playable(fragments: list[bytes]) -> None:
    for index, first in enumerate(FIRSTS):
        check_playable(b"".join(fragments[: index + 1]), first + COUNTS[index], Fraction(16))


def test_a_player_can_seek_to_each_fragment(fragments: list[bytes]) -> None:
    file = b"".join(fragments)
    for first, count in zip(FIRSTS, COUNTS, strict=True):
        with av.open(io.BytesIO(file), mode="r") as container:
            stream = container.streams.video[0]
            assert stream.time_base is not None
            container.seek(int(Fraction(first, 16) / stream.time_base), stream=stream)
            times = [frame.time for frame in container.decode(stream)]
            assert times == [index / 16 for index in range(first, TOTAL)], f"{count} frames from {first}"


def test_a_fragment_begins_with_an_idr_frame(fragments: list[bytes]) -> None:
    """A decoder can start at each fragment, since its first slice has NAL type 5."""
    for data in fragments:
        payload, kinds = box(data, "mdat"), []
        while payload:
            size = int.from_bytes(payload[:4])
            kinds.append(payload[4] & 0x1F)
            payload = payload[4 + size :]
        assert next(kind for kind in kinds if kind in (1, 5)) == 5


def test_a_fragment_does_not_depend_on_earlier_fragments(fragments: list[bytes]) -> None:
    """A new process, which has encoded no other fragment, gives the same bytes."""
    index = 3
    program = (
        "import sys\n"
        "from test_mp4_fragments import fragment\n"
        f"sys.stdout.buffer.write(fragment({FIRSTS[index]}, {COUNTS[index]}))\n"
    )
    here = Path(__file__).parent
    paths = [str(path) for path in (here, here.parent, here.parents[1])]
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{program}"], capture_output=True, check=True
    )
    assert run.stdout == fragments[index]
    assert fragment(0, COUNTS[0]) == fragments[0]


def test_the_encoder_is_configured_for_reproducible_bytes() -> None:
    """x264 writes its options into the stream. Comments in models/media.py give a reason for each option."""
    encoder = Mp4Fragment(320, 32, 16.0, 0)
    encoder.add(torch.zeros(3, 320, 32))
    assert {"mbtree=0", "threads=4", "bframes=0"} <= x264_options(encoder.finish())


def test_bytes_depend_on_position_length_and_frame_rate(fragments: list[bytes]) -> None:
    assert fragment(FIRSTS[1], COUNTS[1] - 1) != fragments[1]
    assert fragment(FIRSTS[1] + 1, COUNTS[1]) != fragments[1]
    assert fragment(FIRSTS[1], COUNTS[1], frame_rate=8.0) != fragments[1]


@pytest.mark.parametrize(
    ("frame_rate", "exact"),
    [(24.0, Fraction(24)), (24000 / 1001, Fraction(24000, 1001)), (12.5, Fraction(25, 2)), (1.0, Fraction(1))],
)
def test_times_are_exact_at_any_rate(frame_rate: float, exact: Fraction) -> None:
    file = b"".join(fragment(first, count, frame_rate) for first, count in ((0, 5), (5, 8)))
    check_playable(file, 13, exact)


def test_scene_cuts_within_a_fragment_give_one_playable_file() -> None:
    """The encoder may insert an IDR frame at a scene cut, which adds a moof box to the fragment."""
    encoder = Mp4Fragment(HEIGHT, WIDTH, 16.0, 0)
    other = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    for index in range(50):
        encoder.add(video_frame(index) if index < 40 else other)
    file = encoder.finish() + fragment(50, 1)
    assert box_types(file).count("moof") == 3
    numbers = [int.from_bytes(box(content, "mfhd")[4:]) for kind, content in boxes(file) if kind == "moof"]
    assert numbers == sorted(set(numbers))
    with av.open(io.BytesIO(file), mode="r") as container:
        assert [frame.time for frame in container.decode(video=0)] == [index / 16 for index in range(51)]
