"""MP4 files with sound: `moov` before `mdat`, interleaved tracks, and reproducible bytes."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator

import av
import pytest
import torch
from torch import Tensor

from models.media import Audio, Mp4File, mp4_bytes
from mp4_boxes import box_types, x264_options
from mp4_sound import decoded_sound


def frames(count: int, size: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.rand(3, size, size, generator=generator)


def tone(seconds: float, rate: int, channels: int) -> Audio:
    """Sine tones; each channel has its own frequency."""
    time = torch.arange(round(seconds * rate)) / rate
    return Audio(
        torch.stack([0.5 * torch.sin(2 * torch.pi * 440 * (each + 1) * time) for each in range(channels)]), rate
    )


@pytest.mark.parametrize(("count", "size"), [(1, 16), (25, 128)])
def test_moov_precedes_mdat(count: int, size: int) -> None:
    file, again = (mp4_bytes(frames(count, size), size, size, 8.0, tone(1.0, 24000, 1)) for _ in range(2))
    assert box_types(file).index("moov") < box_types(file).index("mdat")
    assert file == again
    with av.open(io.BytesIO(file), mode="r") as container:
        assert len(list(container.decode(video=0))) == count


@pytest.mark.parametrize(("rate", "channels"), [(24000, 2), (48000, 2), (16000, 1)])
@pytest.mark.parametrize("seconds", [0.01, 1.0, 4.0])
def test_the_sound_is_an_aac_track(rate: int, channels: int, seconds: float) -> None:
    """The track has all samples, whether it is shorter or longer than the video of 3 seconds."""
    sound = tone(seconds, rate, channels)
    file = mp4_bytes(frames(24, 16), 16, 16, 8.0, sound)
    assert box_types(file).index("moov") < box_types(file).index("mdat")
    assert file == mp4_bytes(frames(24, 16), 16, 16, 8.0, sound)
    with av.open(io.BytesIO(file), mode="r") as container:
        track = container.streams.audio[0]
        assert (track.codec.canonical_name, track.rate, track.codec_context.channels) == ("aac", rate, channels)
        assert len(list(container.decode(video=0))) == 24
    recorded = decoded_sound(file)
    length = sound.samples.shape[1]
    assert length <= recorded.shape[1] < length + 1024
    if seconds >= 1:
        assert float((recorded[:, :length] - sound.samples).norm() / sound.samples.norm()) < 0.05


def test_sound_and_frames_are_interleaved() -> None:
    """At each file position, the times of both tracks differ by less than 1.5 seconds."""
    file = mp4_bytes(frames(96, 16), 16, 16, 8.0, tone(12.0, 24000, 2))
    latest = {"video": 0.0, "audio": 0.0}
    with av.open(io.BytesIO(file), mode="r") as container:
        packets = sorted((each for each in container.demux() if each.pos is not None), key=lambda each: each.pos or 0)
        for packet in packets:
            latest[packet.stream.type] = float((packet.dts or 0) * (packet.time_base or 0))
            assert abs(latest["video"] - latest["audio"]) < 1.5
    assert min(latest.values()) > 11


def test_the_encoder_is_configured_for_reproducible_bytes() -> None:
    file = mp4_bytes(frames(2, 320), 320, 320, 24.0, tone(0.1, 48_000, 1))
    assert {"mbtree=0", "threads=4"} <= x264_options(file)


def test_a_frame_is_encoded_while_the_next_frame_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patched encoder waits for the next frame; sequential execution would time out."""
    computed = [threading.Event() for _ in range(4)]
    encoded: list[int] = []
    encode = Mp4File.add

    def add(file: Mp4File, pixels: Tensor) -> None:
        following = len(encoded) + 1
        assert following == len(computed) or computed[following].wait(10), (
            "the next frame was not computed during encoding"
        )
        encoded.append(following)
        encode(file, pixels)

    def frames() -> Iterator[Tensor]:
        for event in computed:
            event.set()
            yield torch.zeros(3, 16, 16)

    monkeypatch.setattr(Mp4File, "add", add)
    assert mp4_bytes(frames(), 16, 16, 8.0, tone(0.5, 24000, 2))
    assert encoded == [1, 2, 3, 4]


def test_an_encoder_error_is_raised() -> None:
    frames = (torch.zeros(3, size, 16) for size in (16, 16, 20))
    with pytest.raises(av.error.ExternalError, match="libx264"):
        mp4_bytes(frames, 16, 17, 8.0, tone(0.5, 24000, 2))
