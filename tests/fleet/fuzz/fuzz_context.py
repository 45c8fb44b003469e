"""Fake server and client sides of a call with given frames."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from fuzz_inputs import Frames


class Context:
    """Server side of a call; the client sends these frames."""

    def __init__(self, frames: Frames) -> None:
        self._frames = iter(frames)

    async def read(self) -> Any:
        return next(self._frames, grpc.aio.EOF)

    async def write(self, frame: bytes) -> None:
        assert isinstance(frame, bytes)

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def set_trailing_metadata(self, metadata: Any) -> None:
        assert metadata


class Answer:
    """Client side of a call; the server replies with these frames."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for frame in self._frames:
            yield frame

    def cancel(self) -> None:
        """Do nothing, as the frames are finite."""

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK

    async def trailing_metadata(self) -> tuple[()]:
        return ()
