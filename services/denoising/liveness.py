"""The side channel: how a rank of a worker group learns that another one is lost, whatever the others are doing.

A rank that is stopped, or whose machine is gone, ends no connection, and a collective that waits for it waits forever:
the timeouts of collectives must outlast loading and warm-up. So every follower has a connection with rank 0 on which
both send a beat all the time, from a thread of their own. The end of that connection, or silence for
`rank_lost_seconds`, means that the peer is lost; whoever notices ends itself, which ends its connections, so that all
of the group notice.
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
"""Exit code of a rank that gave up because of another one: the group is worth restarting."""

_BEAT, _LEAVING, _END = b".", b"!", b"$"


def abandon(reason: str, code: int = LOST) -> NoReturn:
    """End this process at once and log why: a thread that waits in a collective cannot be unwound."""
    exit_at_once(f"{reason}; this rank ends, so that the group can start again", code)


def _ignore() -> None:
    return None


class Watch:
    """Which peer has been silent for more than `rank_lost_seconds`. Times are seconds of one monotonic clock."""

    def __init__(self, peers: Iterable[int], rank_lost_seconds: float, now: float) -> None:
        self._heard = dict.fromkeys(peers, now)
        self._lost_seconds = rank_lost_seconds
        self._looked = now

    def hear(self, peer: int, now: float) -> None:
        """A peer has said something."""
        self._heard[peer] = now

    def forget(self, peer: int) -> None:
        """A peer has taken its leave."""
        self._heard.pop(peer, None)

    def silent(self, now: float) -> int | None:
        """A peer that is lost. To be asked often, after hear() for all that has arrived.

        A watcher that was not running itself for a good part of the time (a paused machine, a starved process) cannot
        tell: it begins to count anew.
        """
        if now - self._looked > self._lost_seconds / 2:
            self._heard = dict.fromkeys(self._heard, now)
        self._looked = now
        return next((peer for peer, heard in self._heard.items() if now - heard > self._lost_seconds), None)


class Liveness:
    """This rank's side channel to `peers`: all followers for rank 0, rank 0 for a follower."""

    def __init__(
        self, peers: Mapping[int, socket.socket], *, rank_heartbeat_seconds: float, rank_lost_seconds: float
    ) -> None:
        self._peers = dict(peers)
        self._heartbeat_seconds = rank_heartbeat_seconds
        self._lost_seconds = rank_lost_seconds
        self._on_lost: Callable[[str], None] = abandon
        self._on_leaving: Callable[[], None] = _ignore
        self._word = _BEAT
        self._woken, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)

    def start(self, *, on_lost: Callable[[str], None] = abandon, on_leaving: Callable[[], None] | None = None) -> None:
        """Begin to beat and to watch.

        From a thread of its own it calls `on_lost` with a sentence when a peer is lost, and `on_leaving` when a peer
        has been told to end, perhaps repeatedly.
        """
        self._on_lost, self._on_leaving = on_lost, on_leaving or _ignore
        for each in (*self._peers.values(), self._woken, self._waker):
            each.setblocking(False)
        self._thread.start()

    def leave(self) -> None:
        """Tell the peers that this rank has been told to end, and wants the group to. Signal handlers may call it."""
        self._word = _LEAVING
        self._wake()

    def end(self) -> None:
        """Take leave: peers stop to watch this rank, which stops to watch them."""
        self._word = _END
        self._wake()
        self._thread.join()
        for each in (*self._peers.values(), self._woken, self._waker):
            each.close()

    def _wake(self) -> None:
        try:
            self._waker.send(_BEAT)
        except BlockingIOError:
            return  # It is awake.

    def _run(self) -> None:
        watch = Watch(self._peers, self._lost_seconds, time.monotonic())
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for peer, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, peer)
            beat_at = 0.0
            while True:
                word, now = self._word, time.monotonic()
                if now >= beat_at or word is not _BEAT:
                    self._say(word)
                    beat_at = now + self._heartbeat_seconds
                if word is _END:
                    return
                for key, _ in selector.select(max(0.0, beat_at - now)):
                    if key.fileobj is self._woken:
                        self._woken.recv(64)
                    elif not self._hear(key.data, watch):
                        selector.unregister(key.fileobj)
                if (lost := watch.silent(time.monotonic())) is not None:
                    self._on_lost(f"rank {lost} has been silent for {self._lost_seconds:g} s")
                    watch.forget(lost)

    def _say(self, word: bytes) -> None:
        for connection in self._peers.values():
            try:
                connection.send(word)
            except OSError:
                continue  # A peer that reads nothing, or has gone: what it does not say, or its end, will tell.

    def _hear(self, peer: int, watch: Watch) -> bool:
        """Take what a peer says; returns whether it may say more."""
        try:
            words = self._peers[peer].recv(64)
        except BlockingIOError:
            return True
        except OSError:
            words = b""
        watch.hear(peer, time.monotonic())
        if _LEAVING in words:
            self._on_leaving()
        if words and _END not in words:
            return True
        watch.forget(peer)
        if not words:
            self._on_lost(f"rank {peer} has ended")
        return False
