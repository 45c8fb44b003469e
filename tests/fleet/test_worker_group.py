"""A worker group in a fleet: it draws what one process draws, and goes on whatever happens to its ranks."""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fleet.v1 import generation_pb2 as pb
from group_fleet import STEPS, Generated, GroupFleet, group_fleet
from toy_checkpoint import copy_toy_family

# As a kernel that does not end, the follower's step does not: its process lives and beats, and rank 0 waits for it in
# a collective. Stuck is the process that finds the file, which it takes away, so that the next one is not.
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
# Longer than what other tests here do to a rank takes to be noticed.
_HANGS = ("--hang-seconds", "4", "--hang-mean-steps", "4", "--hang-exit-seconds", "1")


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that makes the follower hang."""
    return tmp_path_factory.mktemp("marker") / "hang"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, marker: Path) -> Iterator[GroupFleet]:
    plugins = copy_toy_family(tmp_path_factory.mktemp("plugin") / "plugins")
    with (plugins / "toy_pipeline.py").open("a") as file:
        file.write(_STUCK_FOLLOWER.replace("MARKER", str(marker)))
    words = ("--tp", "2", "--warm-up", "64x64", "--plugins", str(plugins), *_HANGS)
    with group_fleet(tmp_path_factory.mktemp("group"), *words) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(fleet: GroupFleet) -> Generated:
    generated = fleet.generate()
    assert generated.state == pb.REQUEST_STATE_SUCCEEDED
    assert generated.file.startswith(b"\x89PNG")
    return generated


def test_it_draws_what_one_process_draws(undisturbed: Generated, tmp_path_factory: pytest.TempPathFactory) -> None:
    with group_fleet(tmp_path_factory.mktemp("single")) as alone:
        generated = alone.generate()
    one, group = (np.asarray(Image.open(io.BytesIO(each.file)), dtype=int) for each in (generated, undisturbed))
    assert np.abs(one - group).max() <= 1, "sums over ranks may round a pixel's value the other way, and no more"
    assert one.std() > 10, "an empty picture would prove nothing"


def test_coordinators_know_its_degrees(fleet: GroupFleet) -> None:
    (worker,) = fleet.workers()
    assert (worker.degrees.tp, worker.degrees.ulysses, worker.degrees.ring, worker.degrees.cfg) == (2, 1, 1, 1)


def test_a_waiting_follower_is_asleep(fleet: GroupFleet, undisturbed: Generated) -> None:
    assert undisturbed.file
    follower = fleet.ranks()[1]
    began, before = time.monotonic(), follower.cpu_times()
    while time.monotonic() - began < 2:
        time.sleep(0.1)
    after = follower.cpu_times()
    used = (after.user + after.system) - (before.user + before.system)
    assert used <= 0.05 * (time.monotonic() - began), "beats alone take far less than one part in twenty"


def test_a_cancel_leaves_the_group_serving(fleet: GroupFleet, undisturbed: Generated) -> None:
    before = fleet.ranks()
    assert fleet.cancel_at(2).state == pb.REQUEST_STATE_CANCELLED
    assert fleet.generate().file == undisturbed.file
    assert {rank: each.pid for rank, each in fleet.ranks().items()} == {rank: each.pid for rank, each in before.items()}


@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_costs_the_request_nothing(
    fleet: GroupFleet, undisturbed: Generated, rank: int, number: signal.Signals
) -> None:
    before = fleet.ranks()
    generated = fleet.generate(STEPS // 2, partial(before[rank].send_signal, number))
    assert generated.state == pb.REQUEST_STATE_SUCCEEDED
    assert generated.file == undisturbed.file
    assert generated.steps.count(0) == 2, "it did not begin a second time"
    assert not any(process.is_running() for process in before.values())


def test_a_rank_whose_device_is_stuck_ends_its_group_and_costs_the_request_nothing(
    fleet: GroupFleet, undisturbed: Generated, marker: Path
) -> None:
    before = fleet.ranks()
    marker.touch()
    generated = fleet.generate()
    assert not marker.exists(), "no rank was stuck"
    assert generated.state == pb.REQUEST_STATE_SUCCEEDED
    assert generated.file == undisturbed.file
    assert generated.steps.count(1) == 1, "it did not resume at a checkpoint"
    assert not any(process.is_running() for process in before.values())


def test_sigterm_finishes_what_is_under_way(fleet: GroupFleet, undisturbed: Generated) -> None:
    """The last test of this group: it has ended afterwards."""
    ranks = fleet.ranks()
    generated = fleet.generate(2, fleet.agent.terminate)
    assert generated.state == pb.REQUEST_STATE_SUCCEEDED
    assert generated.file == undisturbed.file
    assert fleet.run(fleet.agent.wait()) == 0
    assert not any(process.is_running() for process in ranks.values())
    assert not fleet.workers()
