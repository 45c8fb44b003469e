"""Heartbeats between the ranks of a worker group, by which a rank detects the loss of another rank.

A stopped rank, or a rank on a lost host, does not close its connections, so collectives with it block until their
timeout, which must be longer than loading and warm-up. Therefore, every follower has a connection with rank 0, on which
both ranks send heartbeats from a separate thread. A peer is lost when its connection is closed, or silent for
`rank_lost_seconds`. A rank that detects a loss exits and thereby closes its connections, so all other ranks detect
a loss too.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

from common.process_exit import TEMPORARY_FAILURE, exit_at_once

LOST = TEMPORARY_FAILURE
"""Exit code of a rank that exits because another rank is lost. The launcher then restarts the group."""

_HEARTBEAT, _STOPPING, _END = b".", b"!", b"$"


def abandon(reason: str, code: int = LOST) -> NoReturn:
    """Log the reason and end this process at once, because a thread in a collective cannot be interrupted."""
    exit_at_once(f"{reason}; this rank exits, so that the group can restart", code)


def _ignore() -> None:
    return None


class Watch:
    """Detects peers that are silent for more than `rank_lost_seconds`. Times are `time.monotonic()` seconds."""

    def __init__(self, peers: Iterable[int], rank_lost_seconds: float, now: float) -> None:
        self._received_at = dict.fromkeys(peers, now)
        self._lost_seconds = rank_lost_seconds
        self._checked_at = now

    def received(self, peer: int, now: float) -> None:
        """Record a message from a peer."""
        self._received_at[peer] = now

    def forget(self, peer: int) -> None:
        """Stop watching a peer."""
        self._received_at.pop(peer, None)

    def silent(self, now: float) -> int | None:
        """Return a lost peer, or None. Call it often, each time after received() for all messages in the buffers.

        If the previous call was more than half of `rank_lost_seconds` ago (a paused host, a starved process), silence
        does not indicate a loss, and all timers restart.
        """
        if now - self._checked_at > self._lost_seconds / 2:
            self._received_at = dict.fromkeys(self._received_at, now)
        self._checked_at = now
        return next((peer for peer, at in self._received_at.items() if now - at > self._lost_seconds), None)


class Liveness:
    """The heartbeat connections of this rank: with all followers on rank 0, with rank 0 on a follower."""

    def __init__(
        self, peers: Mapping[int, socket.socket], *, rank_heartbeat_seconds: float, rank_lost_seconds: float
    ) -> None:
        self._peers = dict(peers)
        self._heartbeat_seconds = rank_heartbeat_seconds
        self._lost_seconds = rank_lost_seconds
        self._on_lost: Callable[[str], None] = abandon
        self._on_stopping: Callable[[], None] = _ignore
        self._message = _HEARTBEAT
        self._woken, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)

    def start(self, *, on_lost: Callable[[str], None] = abandon, on_stopping: Callable[[], None] | None = None) -> None:
        """Start sending heartbeats and watching the peers.

        A separate thread calls `on_lost` with a reason when a peer is lost, and `on_stopping`, at least once, when a
        peer has received a stop signal.
        """
        self._on_lost, self._on_stopping = on_lost, on_stopping or _ignore
        for each in (*self._peers.values(), self._woken, self._waker):
            each.setblocking(False)
        self._thread.start()

    def request_stop(self) -> None:
        """Ask the peers to stop the group, because this rank received a signal. Safe in signal handlers."""
        self._message = _STOPPING
        self._wake()

    def end(self) -> None:
        """Announce a regular exit, so that the peers stop watching this rank; close the connections."""
        self._message = _END
        self._wake()
        self._thread.join()
        for each in (*self._peers.values(), self._woken, self._waker):
            each.close()

    def _wake(self) -> None:
        try:
            self._waker.send(_HEARTBEAT)
        except BlockingIOError:
            return  # The buffer is full, so the thread is already woken.

    def _run(self) -> None:
        watch = Watch(self._peers, self._lost_seconds, time.monotonic())
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for peer, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, peer)
            send_at = 0.0
            while True:
                message, now = self._message, time.monotonic()
                if now >= send_at or message is not _HEARTBEAT:
                    self._send(message)
                    send_at = now + self._heartbeat_seconds
                if message is _END:
                    return
                for key, _ in selector.select(max(0.0, send_at - now)):
                    if key.fileobj is self._woken:
                        self._woken.recv(64)
                    elif not self._receive(key.data, watch):
                        selector.unregister(key.fileobj)
                if (lost := watch.silent(time.monotonic())) is not None:
                    self._on_lost(f"rank {lost} has been silent for {self._lost_seconds:g} s")
                    watch.forget(lost)

    def _send(self, message: bytes) -> None:
        for connection in self._peers.values():
            try:
                connection.send(message)
            except OSError:
                continue  # The peer hangs or has exited. _receive() or silent() detects this.

    def _receive(self, peer: int, watch: Watch) -> bool:
        """Receive messages of a peer. Returns whether more messages may follow."""
        try:
            messages = self._peers[peer].recv(64)
        except BlockingIOError:
            return True
        except OSError:
            messages = b""
        watch.received(peer, time.monotonic())
        if _STOPPING in messages:
            self._on_stopping()
        if messages and _END not in messages:
            return True
        watch.forget(peer)
        if not messages:
            self._on_lost(f"rank {peer} has exited")
        return False
