"""The messages between rank 0 and a follower on their control connection, and their encoding.

A message is its kind (one byte), the size of its payload (four bytes, big endian) and the payload. For one call:

    rank 0                                   follower
    CALL     request id, variant    ──▶      as lines of text
    INPUT    header, then chunks    ──▶      the frames of the stage's RPC, as a coordinator would send them
    RUN                             ──▶      both run the stage
    CHECK    continue, or the error ──▶      once per question of the stage whether to continue, or to hand over
    OUTCOME  result or error        ◀─▶      the outcome of the call, which each side compares with its own

END ends the follower. FACTS, once from each side before the first call, contains the sender's facts of
services.denoising.facts, one per line. Nothing is pickled.
"""

from __future__ import annotations

import socket
import struct
from enum import IntEnum

from common.rpc.options import MAX_MESSAGE_BYTES

_HEAD = struct.Struct(">BI")


class Kind(IntEnum):
    """The kind of a message."""

    CALL = 1
    INPUT = 2
    RUN = 3
    CHECK = 4
    OUTCOME = 5
    END = 6
    FACTS = 20


class OutOfStep(Exception):
    """The ranks of a group no longer run the same call, or a rank is lost: the group must restart."""


class Link:
    """One end of a control connection. Its two directions are independent, and each is used by one thread."""

    def __init__(self, peer: int, connection: socket.socket) -> None:
        self.peer = peer
        self._socket = connection

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send a message. Raises OutOfStep when the peer is disconnected."""
        try:
            self._socket.sendall(_HEAD.pack(kind, len(payload)) + payload)
        except OSError as error:
            raise OutOfStep(f"rank {self.peer} is disconnected: {error}") from error

    def receive(self, *expected: Kind, seconds: float | None = None) -> tuple[Kind, bytes]:
        """Receive the next message, for at most `seconds`. Blocks without polling.

        Raises OutOfStep for an unexpected kind of message, a timeout, or a disconnected peer.
        """
        self._socket.settimeout(seconds)
        try:
            number, size = _HEAD.unpack(read_exactly(self._socket, _HEAD.size))
            if number not in expected:
                wanted = " or ".join(kind.name for kind in expected)
                raise OutOfStep(f"rank {self.peer} sent message {number}; expected {wanted}")
            if size > MAX_MESSAGE_BYTES:
                raise OutOfStep(f"rank {self.peer} sent a message of {size} bytes, more than {MAX_MESSAGE_BYTES}")
            return Kind(number), read_exactly(self._socket, size)
        except TimeoutError as error:
            raise OutOfStep(f"rank {self.peer} sent no message for {seconds:g} s") from error
        except OSError as error:
            raise OutOfStep(f"rank {self.peer} is disconnected: {error}") from error
        finally:
            self._socket.settimeout(None)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def read_exactly(connection: socket.socket, size: int) -> bytes:
    """Read `size` bytes. Raises OSError when the connection ends before, or on timeout."""
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("connection closed by the peer")
        view = view[count:]
    return bytes(buffer)
