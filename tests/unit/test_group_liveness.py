"""Heartbeat connections between ranks: detection of lost ranks, and events that are not a loss."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from services.denoising.launcher import _is_stopped
from services.denoising.liveness import LOST, Liveness, Watch

WAIT = 20  # timeout of expected events, in seconds


@dataclass
class Callbacks:
    """Recorded callbacks of the heartbeat connections of one rank."""

    reasons: list[str] = field(default_factory=list)
    lost: threading.Event = field(default_factory=threading.Event)
    stopping: threading.Event = field(default_factory=threading.Event)

    def on_lost(self, reason: str) -> None:
        self.reasons.append(reason)
        self.lost.set()

    def start(self, liveness: Liveness) -> Liveness:
        """Start `liveness` with these callbacks."""
        liveness.start(on_lost=self.on_lost, on_stopping=self.stopping.set)
        return liveness


def channel(peer: int, connection: socket.socket, rank_lost_seconds: float = WAIT) -> Liveness:
    return Liveness({peer: connection}, rank_heartbeat_seconds=0.005, rank_lost_seconds=rank_lost_seconds)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    yield left, right
    left.close()
    right.close()


def test_silence_is_counted_from_the_last_heartbeat() -> None:
    watch = Watch([1, 2], 8.0, 0.0)
    for now in range(1, 9):
        watch.received(1, float(now))
        assert watch.silent(float(now)) is None
    assert watch.silent(8.1) == 2
    watch.forget(2)
    assert watch.silent(12.0) is None
    assert watch.silent(15.9) is None
    assert watch.silent(16.1) == 1


def test_a_suspended_watcher_reports_no_loss() -> None:
    watch = Watch([1], 8.0, 0.0)
    assert watch.silent(100.0) is None
    assert watch.silent(103.0) is None
    assert watch.silent(106.0) is None
    assert watch.silent(108.1) == 1


def test_a_closed_connection_is_a_loss(ends: tuple[socket.socket, socket.socket]) -> None:
    seen = Callbacks()
    liveness = seen.start(channel(3, ends[0]))
    ends[1].close()
    assert seen.lost.wait(WAIT)
    assert seen.reasons == ["rank 3 has exited"]
    liveness.end()


def test_a_silent_peer_is_a_loss(ends: tuple[socket.socket, socket.socket]) -> None:
    seen = Callbacks()
    liveness = seen.start(channel(0, ends[0], rank_lost_seconds=0.05))
    assert seen.lost.wait(WAIT)
    assert seen.reasons == ["rank 0 has been silent for 0.05 s"]
    liveness.end()


def test_heartbeats_and_regular_exits_are_not_a_loss(ends: tuple[socket.socket, socket.socket]) -> None:
    left, right = Callbacks(), Callbacks()
    one, other = left.start(channel(1, ends[0])), right.start(channel(0, ends[1]))
    other.request_stop()
    assert left.stopping.wait(WAIT)
    assert not right.stopping.is_set()
    one.end()
    other.end()
    assert not left.reasons
    assert not right.reasons


def test_abandon_logs_the_reason_and_exits() -> None:
    code = "from services.denoising.liveness import abandon; abandon('rank 1 has ended')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == LOST
    assert "rank 1 has ended; this rank exits, so that the group can restart" in ended.stderr


def test_abandon_exits_although_logging_is_blocked() -> None:
    code = (
        "import logging, threading; from common import process_exit; process_exit._LAST_LINE_SECONDS = 0.1;"
        "from services.denoising import liveness;"
        "threading.Thread(target=logging.lastResort.lock.acquire).start(); liveness.abandon('rank 1 has ended')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=WAIT)
    assert ended.returncode == -signal.SIGALRM


def test_is_stopped_follows_sigstop_and_sigcont() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    try:
        assert not _is_stopped(child.pid)
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        assert _is_stopped(child.pid)
        assert child.poll() is None
        child.send_signal(signal.SIGCONT)
        os.waitid(os.P_PID, child.pid, os.WCONTINUED | os.WNOWAIT)
        assert not _is_stopped(child.pid)
    finally:
        child.kill()
        child.wait()
    assert not _is_stopped(child.pid)
