"""What rank 0 and a follower say to each other over their control connection, and how it lies on the socket.

A message is its kind (one byte), the size of its payload (four bytes, big endian) and the payload. For one call:

    rank 0                                   follower
    CALL     request id, variant    ──▶      as two lines
    INPUT    header, then chunks    ──▶      the frames of the stage's RPC, as a coordinator would send them
    RUN                             ──▶      both run the stage
    CHECK    go on, or the error    ──▶      once for each time that the stage asks whether it goes on, or hands over
    OUTCOME  result or error        ◀─▶      how the call ended, which each side compares with its own

END ends the follower. FACTS, once from each side before the first call, are the sender's facts of
services.denoising.facts, one a line. Nothing on the wire is pickled.
"""

from __future__ import annotations

import socket
import struct
from enum import IntEnum

from common.rpc.options import MAX_MESSAGE_BYTES

_HEAD = struct.Struct(">BI")


class Kind(IntEnum):
    """What a message says."""

    CALL = 1
    INPUT = 2
    RUN = 3
    CHECK = 4
    OUTCOME = 5
    END = 6
    FACTS = 20


class OutOfStep(Exception):
    """The ranks of a group do not do the same any more, or one has gone: the group cannot go on."""


class Link:
    """One end of a control connection. Its two directions are independent; each belongs to one thread."""

    def __init__(self, peer: int, connection: socket.socket) -> None:
        self.peer = peer
        self._socket = connection

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send a message. Raises OutOfStep when the peer has gone."""
        try:
            self._socket.sendall(_HEAD.pack(kind, len(payload)) + payload)
        except OSError as error:
            raise OutOfStep(f"rank {self.peer} has gone: {error}") from error

    def receive(self, *expected: Kind, seconds: float | None = None) -> tuple[Kind, bytes]:
        """The next message; the thread sleeps until it comes, at most so many seconds.

        Raises OutOfStep when it is of another kind, does not come in time, or the peer has gone.
        """
        self._socket.settimeout(seconds)
        try:
            number, size = _HEAD.unpack(read_exactly(self._socket, _HEAD.size))
            if number not in expected:
                wanted = " or ".join(kind.name for kind in expected)
                raise OutOfStep(f"rank {self.peer} sent message {number} where {wanted} should come")
            if size > MAX_MESSAGE_BYTES:
                raise OutOfStep(f"rank {self.peer} sent a message of {size} bytes; at most {MAX_MESSAGE_BYTES} travel")
            return Kind(number), read_exactly(self._socket, size)
        except TimeoutError as error:
            raise OutOfStep(f"rank {self.peer} has said nothing for {seconds:g} s") from error
        except OSError as error:
            raise OutOfStep(f"rank {self.peer} has gone: {error}") from error
        finally:
            self._socket.settimeout(None)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def read_exactly(connection: socket.socket, size: int) -> bytes:
    """The next bytes of a connection. Raises OSError when it ends before them, or does not bring them in time."""
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("its connection is closed")
        view = view[count:]
    return bytes(buffer)
