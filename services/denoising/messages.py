"""The messages between rank 0 and a follower on their control connection, and their encoding.

A message consists of kind (one byte), payload size (four bytes, big endian) and payload. The messages of one call:

    rank 0                                   follower
    CALL     call header            ──▶      fields of CallHeader, one per line
    INPUT    header, then chunks    ──▶      the frames of the stage's RPC, as a coordinator sends them
    RUN                             ──▶      both run the stage
    CHECK    answer                 ──▶      one per question of the stage; see services.denoising.agreement
    OUTCOME  result or error        ◀─▶      each side compares the other's outcome with its own

END ends the follower. Before the first call, each side sends FACTS: the facts of services.denoising.facts, one per
line. Nothing is pickled.
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
    """The ranks of a group no longer run the same call, or a rank is lost. The group must restart."""


class Link:
    """One end of a control connection. One thread may send while another thread receives."""

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
        """Receive the next message, without polling. `seconds` is the timeout; None waits forever.

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
    """Read exactly `size` bytes. Raises OSError if the connection ends earlier or times out."""
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("connection closed by the peer")
        view = view[count:]
    return bytes(buffer)
