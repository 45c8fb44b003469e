"""A worker group in a fleet. Its images match those of one process; requests survive lost and hung ranks."""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fleet.v1 import generation_pb2 as pb
from group_fleet import Generated, GroupFleet, group_fleet
from toy_checkpoint import copy_toy_family

# Emulates a hung kernel: the follower's step does not return, its process still sends heartbeats, and rank 0 waits in a
# collective. The first process deletes the marker file and hangs; the process that replaces it does not.
_STUCK_FOLLOWER = """
import os, threading

from services.denoising.agreement import FollowingCall

_check = FollowingCall.check_cancelled
_checks = {}


def check_cancelled(call):
    _check(call)
    _checks[call.request_id] = _checks.get(call.request_id, 0) + 1
    if _checks[call.request_id] == 8:
        try:
            os.unlink("MARKER")
        except FileNotFoundError:
            return
        threading.Event().wait()


FollowingCall.check_cancelled = check_cancelled
"""
# Longer than --rank-lost-seconds (2 s), so that a lost rank is not detected as a hang.
_HANGS = ("--hang-seconds", "4", "--hang-mean-steps", "4", "--hang-exit-seconds", "1")


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the marker file that makes the follower hang."""
    return tmp_path_factory.mktemp("marker") / "hang"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, marker: Path) -> Iterator[GroupFleet]:
    plugins = copy_toy_family(tmp_path_factory.mktemp("plugin") / "plugins")
    with (plugins / "toy_pipeline.py").open("a") as file:
        file.write(_STUCK_FOLLOWER.replace("MARKER", str(marker)))
    flags = ("--tp", "2", "--warm-up", "64x64", "--plugins", str(plugins), *_HANGS)
    with group_fleet(tmp_path_factory.mktemp("group"), *flags) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(fleet: GroupFleet) -> Generated:
    generated = fleet.generate()
    assert generated.state == pb.REQUEST_STATE_SUCCEEDED
    assert generated.file.startswith(b"\x89PNG")
    return generated


def test_group_image_matches_one_process(undisturbed: Generated, tmp_path_factory: pytest.TempPathFactory) -> None:
    with group_fleet(tmp_path_factory.mktemp("single")) as alone:
        generated = alone.generate()
    one, group = (np.asarray(Image.open(io.BytesIO(each.file)), dtype=int) for each in (generated, undisturbed))
    assert np.abs(one - group).max() <= 1, "pixels differ by more than rounding"
    assert one.std() > 10, "the image is empty"


def test_degrees_are_announced(fleet: GroupFleet) -> None:
    (worker,) = fleet.workers()
    assert (worker.degrees.tp, worker.degrees.ulysses, worker.degrees.ring, worker.degrees.cfg) == (2, 1, 1, 1)


def test_idle_follower_uses_almost_no_cpu_time(fleet: GroupFleet, undisturbed: Generated) -> None:
    assert undisturbed.file
    follower = fleet.ranks()[1]
    began, before = time.monotonic(), follower.cpu_times()
    while time.monotonic() - began < 2:
        time.sleep(0.1)
    after = follower.cpu_times()
    used = (after.user + after.system) - (before.user + before.system)
    assert used <= 0.05 * (time.monotonic() - began), "an idle follower uses more than 5% of a core"


def test_group_serves_requests_after_a_cancel(fleet: GroupFleet, undisturbed: Generated) -> None:
    before = fleet.ranks()
    assert fleet.cancel_at(2).state == pb.REQUEST_STATE_CANCELLED
    assert fleet.generate().file == undisturbed.file
    assert {rank: each.pid for rank, each in fleet.ranks().items()} == {rank: each.pid for rank, each in before.items()}


@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_request_survives_a_lost_rank(
    fleet: GroupFleet, undisturbed: Generated, rank: int, signum: signal.Signals
) -> None:
    before = fleet.ranks()
    generated = fleet.lose_rank(rank, signum)
    assert generated.state == pb.REQUEST_STATE_SUCCEEDED
    assert generated.file == undisturbed.file
    assert generated.steps.count(0) == 2, "the request did not restart"
    assert not any(process.is_running() for process in before.values())


def test_request_survives_a_hung_rank(fleet: GroupFleet, undisturbed: Generated, marker: Path) -> None:
    before = fleet.ranks()
    marker.touch()
    generated = fleet.generate()
    assert not marker.exists(), "no rank hung"
    assert generated.state == pb.REQUEST_STATE_SUCCEEDED
    assert generated.file == undisturbed.file
    resumed_steps = generated.steps[generated.steps.index(0, 1) + 1 :]
    assert resumed_steps[0] > 1, "the request did not resume from a step checkpoint"
    assert not any(process.is_running() for process in before.values())


def test_sigterm_finishes_the_running_request(fleet: GroupFleet, undisturbed: Generated) -> None:
    """This test is last, as it ends the group."""
    ranks = fleet.ranks()
    generated = fleet.generate(2, fleet.agent.terminate)
    assert generated.state == pb.REQUEST_STATE_SUCCEEDED
    assert generated.file == undisturbed.file
    assert fleet.run(fleet.agent.wait()) == 0
    assert not any(process.is_running() for process in ranks.values())
    assert not fleet.workers()
