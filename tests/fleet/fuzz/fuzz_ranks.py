"""Fuzz targets between the ranks of a worker group: calls, outcomes, hello messages, heartbeats.

Ranks trust each other. A rank that is out of step must raise OutOfStep, after which the group restarts. Rank 0 must
ignore unknown clients at its port.
"""

from __future__ import annotations

import io
import socket
import struct
from collections.abc import Iterator
from typing import Any, cast

from fuzz_frames import framed_seeds
from fuzz_inputs import Frames
from fuzz_targets import LIMITS, Reader, Target, frame_type

from async_tests import HANG_SECONDS
from common.errors import Cancelled
from common.local import HostedStages
from common.rpc.method import request_type, stage_method
from services.denoising.agreement import CONTINUE, outcome
from services.denoising.follower import Follower
from services.denoising.group import compare
from services.denoising.joining import Place, Purpose, join
from services.denoising.liveness import Liveness
from services.denoising.messages import Kind, Link

_SERVICE = "denoising"
_PLACE = Place(0, 0, world_size=2, num_nodes=1, store_host="127.0.0.1", store_port=0, token="a" * 32)
_MOST_HELLO_BYTES = 4096  # fits into a socket buffer, so that sending does not block
_CANCELLED = outcome(Cancelled("request 1 was cancelled"))


def rank_targets() -> Iterator[Target]:
    """Yield all targets; no target has resources to close."""
    request = request_type(stage_method(_SERVICE))
    calls = list(_calls())
    yield Target("rank.call", _follow_messages, calls, [frame_type(request)])
    yield Target("rank.wire", _follow_bytes, [tuple(_on_the_wire(each) for each in call) for call in calls])
    yield Target("rank.outcome", _compare, [(_on_the_wire(_message(Kind.OUTCOME)),)])
    yield Target("rank.hello", _join, [(_hello(Purpose.CONTROL), b""), (_hello(Purpose.HEARTBEATS),)])
    yield Target("rank.beats", _beat, [(b".", b"..", b"$"), (b".", b"!")])


class _Connection:
    """A connection that delivers these bytes and then its end; sent bytes are discarded."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def recv_into(self, view: memoryview) -> int:
        return self._data.readinto(view)

    def sendall(self, _: bytes) -> None:
        """Discard the data."""

    def settimeout(self, _: float | None) -> None:
        """Ignore the timeout, as no call blocks."""


def _link(data: bytes) -> Link:
    return Link(0, cast(socket.socket, _Connection(data)))


def _message(kind: Kind, payload: bytes = b"") -> bytes:
    """A message without its length prefix, as mutations may change its length."""
    return bytes((kind,)) + payload


def _on_the_wire(message: bytes) -> bytes:
    return message[:1] + struct.pack(">I", max(len(message) - 1, 0)) + message[1:]


def _calls() -> Iterator[Frames]:
    """Messages of rank 0 for a valid call, which succeeds or is cancelled, and END."""
    for frames in framed_seeds(request_type(stage_method(_SERVICE)))[:2]:
        for answer, end in ((CONTINUE, b""), (_CANCELLED, _CANCELLED)):
            yield (
                _message(Kind.CALL, b"request"),
                *(_message(Kind.INPUT, frame) for frame in frames),
                _message(Kind.RUN),
                _message(Kind.CHECK, answer),
                _message(Kind.OUTCOME, end),
                _message(Kind.END),
            )


def _follow_messages(frames: Frames) -> None:
    _follow_bytes(tuple(_on_the_wire(each) for each in frames if each))


def _follow_bytes(frames: Frames) -> None:
    stages = cast(HostedStages, Reader(_SERVICE))
    Follower(_SERVICE, stages, _link(b"".join(frames)), total_bytes=LIMITS.total_bytes).follow()


def _compare(frames: Frames) -> None:
    compare(_link(b"".join(frames)), b"")


def _hello(purpose: Purpose, rank: int = 1) -> bytes:
    return _PLACE.token.encode() + bytes((purpose,)) + struct.pack(">I", rank)


class _Store:
    """A fake store. When rank 0 publishes its address, one unknown client per frame connects, then the follower."""

    def __init__(self, strangers: Frames) -> None:
        self._strangers = strangers
        self.follower: list[socket.socket] = []

    def set(self, _: str, value: str) -> None:
        host, port = value.split()
        for message in self._strangers:
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(message[:_MOST_HELLO_BYTES])
        for purpose in Purpose:
            self.follower.append(socket.create_connection((host, int(port))))
            self.follower[-1].sendall(_hello(purpose))


def _join(frames: Frames) -> None:
    """Rank 0 must find its follower after any number of unknown clients."""
    store = _Store(frames[:8])
    joined = join(_PLACE, cast(Any, store), HANG_SECONDS)
    assert {rank: set(each) for rank, each in joined.items()} == {1: set(Purpose)}
    for connection in (*joined[1].values(), *store.follower):
        connection.close()


def _beat(frames: Frames) -> None:
    """The heartbeat connection must accept any data, and end() must return."""
    here, peer = socket.socketpair()
    with peer:
        peer.sendall(b"".join(frames)[:_MOST_HELLO_BYTES])
        peer.shutdown(socket.SHUT_WR)
        liveness = Liveness({1: here}, rank_heartbeat_seconds=60.0, rank_lost_seconds=60.0)
        liveness.start(on_lost=lambda _: None)
        assert peer.recv(1) == b"."  # The thread has started, and reads once before end() takes effect.
        liveness.end()
