"""MP4 files: playable from the first bytes, and the same bytes each time."""

from __future__ import annotations

import io
from collections.abc import Iterator

import av
import pytest
import torch
from torch import Tensor

from models.media import mp4_bytes


def frames(count: int, size: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.rand(3, size, size, generator=generator)


def boxes(file: bytes) -> list[str]:
    """The types of the top-level boxes, in order (ISO/IEC 14496-12)."""
    found, offset = [], 0
    while offset < len(file):
        size = int.from_bytes(file[offset : offset + 4])
        found.append(file[offset + 4 : offset + 8].decode())
        assert size >= 8
        offset += size
    return found


@pytest.mark.parametrize(("count", "size"), [(1, 16), (25, 128)])
def test_the_index_stands_before_the_frames(count: int, size: int) -> None:
    file = mp4_bytes(frames(count, size), size, size, 8.0)
    assert boxes(file).index("moov") < boxes(file).index("mdat")
    assert file == mp4_bytes(frames(count, size), size, size, 8.0)
    with av.open(io.BytesIO(file), mode="r") as container:
        assert len(list(container.decode(video=0))) == count
