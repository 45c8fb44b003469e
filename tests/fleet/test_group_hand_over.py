"""At SIGTERM, a worker group hands its request over to another group at a step boundary."""

from __future__ import annotations

import time
from asyncio.subprocess import Process
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from fleet.v1 import generation_pb2 as pb
from group_fleet import Generated, GroupFleet, Workload, group_fleet
from toy_checkpoint import copy_toy_family

# No test stops a rank, so that only a rank that ends is lost, even on a busy host.
_LIVENESS_FLAGS = ("--rank-heartbeat-seconds", "0.1", "--rank-lost-seconds", "60")
WORKLOAD = Workload(steps=90, size=64, liveness_flags=_LIVENESS_FLAGS)
GRACE_SECONDS = 30
# Delays each step while a marker file exists, so that the request ends neither before the hand-over nor before the
# grace period is over. Calls of the only group are handed over 23 s before the end of the grace period.
_SLOW_FOLLOWER = """
import os, time

from common.rpc import hand_over
from services.denoising.agreement import FollowingCall

_check = FollowingCall.check_cancelled


def check_cancelled(call):
    if os.path.exists("MARKER"):
        time.sleep(0.2)
    _check(call)


FollowingCall.check_cancelled = check_cancelled
hand_over._MARGIN_SECONDS = 23.0
hand_over._MARGIN_OF_GRACE = 1.0
"""
# Disables step checkpoints other than those of a hand-over.
_NO_CHECKPOINTS = ("--step-checkpoint-every", "0", "--step-checkpoint-seconds", "0")
_FLAGS = ("--tp", "2", "--grace-seconds", str(GRACE_SECONDS), *_NO_CHECKPOINTS)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the marker file that delays steps."""
    return tmp_path_factory.mktemp("marker") / "slow"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, slow: Path) -> Iterator[GroupFleet]:
    plugins = copy_toy_family(tmp_path_factory.mktemp("plugin") / "plugins")
    with (plugins / "toy_pipeline.py").open("a") as file:
        file.write(_SLOW_FOLLOWER.replace("MARKER", str(slow)))
    directory = tmp_path_factory.mktemp("group")
    with group_fleet(directory, *_FLAGS, "--plugins", str(plugins), workload=WORKLOAD) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(fleet: GroupFleet) -> Generated:
    generated = fleet.generate()
    assert generated.state == pb.REQUEST_STATE_SUCCEEDED
    return generated


def handed_over_and_lost() -> tuple[float, float]:
    """Number of handed-over denoiser calls, and number of lost denoiser calls."""
    handed_over, lost = 0.0, 0.0
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            handed_over += sample.value if sample.name == "fleet_handed_over_calls_total" else 0
            lost += sample.value if sample.name == "fleet_lost_calls_total" else 0
    return handed_over, lost


@contextmanager
def slow_request(fleet: GroupFleet, slow: Path, agent: Process) -> Iterator[Future[Generated]]:
    """Run a request with slow steps in the block; `agent` receives SIGTERM at step 3."""
    slow.touch()
    with ThreadPoolExecutor(1) as executor:
        try:
            yield executor.submit(fleet.generate, 3, agent.terminate)
        finally:
            slow.unlink()


def check(generated: Generated, undisturbed: Generated) -> None:
    assert generated.state == pb.REQUEST_STATE_SUCCEEDED
    assert generated.file == undisturbed.file
    assert generated.steps.count(0) == 2, "the request did not run on exactly two groups"
    steps = [step for step in generated.steps if step]
    assert steps == sorted(set(steps)), "a step was computed twice"
    assert steps[-1] == WORKLOAD.steps


def test_sigterm_hands_a_request_over_to_an_equal_group(fleet: GroupFleet, undisturbed: Generated, slow: Path) -> None:
    """The request starts on the new group, which has run the fewest requests. The first group continues it."""
    leaving = fleet.add_group("leaving")
    ranks, before = fleet.ranks_of(leaving), handed_over_and_lost()
    with slow_request(fleet, slow, leaving) as request:
        assert fleet.run(leaving.wait()) == 0
        assert not any(process.is_running() for process in ranks.values())
        assert not request.done()
    check(request.result(), undisturbed)
    assert handed_over_and_lost() == (before[0] + 1, before[1])
    assert len(fleet.workers()) == 1


def test_sigterm_of_the_only_group_hands_over_within_the_grace_period(
    fleet: GroupFleet, undisturbed: Generated, slow: Path
) -> None:
    """This test is last, as it ends the first group. A group that starts later finishes the request."""
    ranks, before, began = fleet.ranks(), handed_over_and_lost(), time.monotonic()
    with slow_request(fleet, slow, fleet.agent) as request:
        assert fleet.run(fleet.agent.wait()) == 0
        assert time.monotonic() - began > 3, "the hand-over did not wait for another group"
        assert not any(process.is_running() for process in ranks.values())
        assert not fleet.workers()
        assert handed_over_and_lost() == (before[0] + 1, before[1])
        fleet.add_group("next")
    check(request.result(), undisturbed)
    assert handed_over_and_lost() == (before[0] + 1, before[1])
