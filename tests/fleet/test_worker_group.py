"""A worker group in a fleet: it draws what one process draws, and goes on whatever happens to its ranks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import partial

import pytest

from fleet.v1 import generation_pb2 as pb
from group_fleet import STEPS, Drawn, GroupFleet, group_fleet


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GroupFleet]:
    with group_fleet(tmp_path_factory.mktemp("group"), "--tp", "2") as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(fleet: GroupFleet) -> Drawn:
    drawn = fleet.draw()
    assert drawn.state == pb.REQUEST_STATE_SUCCEEDED
    assert drawn.file.startswith(b"\x89PNG")
    return drawn


@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_costs_the_request_nothing(
    fleet: GroupFleet, undisturbed: Drawn, rank: int, number: signal.Signals
) -> None:
    before = fleet.ranks()
    drawn = fleet.draw(STEPS // 2, partial(before[rank].send_signal, number))
    assert drawn.state == pb.REQUEST_STATE_SUCCEEDED
    assert drawn.file == undisturbed.file
    assert drawn.steps.count(0) == 2, "it did not begin a second time"
    assert not any(process.is_running() for process in before.values())
