"""The rule that gives up a request after losses of workers, and the wait for the rule's decision."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from common.errors import InternalError, Unavailable
from common.rpc.framing import Packet
from common.state import retries
from common.state.leases import Leases, Loss
from fleet.v1 import artifacts_pb2
from services.coordinator.poison import reason_to_give_up
from services.coordinator.resume import Recovery


def loss(
    reached: int = 0, *, stage: int = 2, churn: bool = False, suspect: bool = True, left: float = 0.0, name: str = "w"
) -> Loss:
    return Loss(name, "denoising", stage, reached, suspect, churn, left)


QUIET, CHURN = loss(), loss(churn=True)


@pytest.mark.parametrize(
    ("losses", "given_up_after"),
    [
        ([loss(4)] * 5, 3),  # the request kills each worker at step 5, after a step checkpoint at step 4
        ([loss(0), loss(4), loss(4), loss(4)], 4),  # the first worker died before the first step checkpoint
        ([loss(4), loss(4), loss(5), loss(5), loss(5)], 5),
        ([loss(step) for step in range(20)], 10),  # the request kills each worker at a later step
        ([loss(4), loss(4), loss(3), loss(4)], 3),  # the request restarted at step 0, which is no progress
        ([loss(4), loss(4), loss(4, stage=3), loss(4, stage=3), loss(4, stage=3)], 5),  # progress to a later service
        ([loss(4), loss(4), loss(4, stage=0)], 3),  # an earlier service, after a take-over
        ([QUIET, QUIET, CHURN] + [QUIET] * 10, 10),
        ([CHURN] * 12, 10),
        ([loss(step, churn=True) for step in range(100)], None),  # losses in churn do not count while there is progress
        ([loss(step // 9, churn=True) for step in range(100)], None),
        ([CHURN] * 9 + [loss(1)] * 2, None),
        ([CHURN] * 9 + [loss(1)] * 3, 12),
        ([loss(step, churn=step % 2 == 0) for step in range(40)], 20),  # 10 losses outside churn
    ],
)
def test_a_request_is_given_up_after_a_number_of_losses(losses: list[Loss], given_up_after: int | None) -> None:
    counts = range(len(losses) + 1)
    first = next((count for count in counts if reason_to_give_up(losses[:count])), None)
    assert first == given_up_after


def test_the_reason_states_the_number_of_lost_workers() -> None:
    assert reason_to_give_up([QUIET] * 3).startswith(
        "3 workers were lost while they ran this request, without progress"
    )
    assert reason_to_give_up([loss(step) for step in range(10)]).startswith("10 workers were lost")


class FakeLeases(Leases):
    """Leases that return the given answers in order; the last answer repeats."""

    def __init__(self, *answers: list[Loss] | Exception) -> None:
        self.answers = list(answers)
        self.reads = 0
        self.deaths: list[tuple[str, str, int]] = []
        self.saved: list[int] = []

    async def losses(self, request_id: str, epoch: int) -> list[Loss]:
        del request_id, epoch
        self.reads += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def add_death(self, request_id: str, epoch: int, worker_id: str, **more: Any) -> list[Loss]:
        del request_id, epoch
        self.deaths.append((worker_id, more["service"], more["stage"]))
        return []

    async def save_step_checkpoint(
        self, request_id: str, epoch: int, number: int, parts: Iterable[bytes], *, step: int
    ) -> bool:
        del request_id, epoch, number, parts
        assert not self.deaths
        await asyncio.sleep(0.01)
        self.saved.append(step)
        return True


def recovery(leases: FakeLeases, epoch: int = 1) -> Recovery:
    return Recovery(leases, "r", epoch=epoch)


def test_a_request_without_losses_does_not_read_losses_from_the_store() -> None:
    leases = FakeLeases([QUIET])
    assert not asyncio.run(recovery(leases).wait_until_claimable())
    assert leases.reads == 0


def test_a_request_claims_a_whole_worker_after_a_loss_until_the_loss_is_cleared() -> None:
    async def scenario() -> None:
        leases = FakeLeases([loss(suspect=False, left=5.0)], [])
        request_recovery = recovery(leases)
        await request_recovery.worker_lost("w", "denoising", 2)
        assert leases.deaths == [("w", "denoising", 2)]
        # The rule is undecided: the request continues at once, and claims a whole worker.
        assert await request_recovery.wait_until_claimable()
        assert not await request_recovery.wait_until_claimable()
        assert not await request_recovery.wait_until_claimable()
        assert leases.reads == 2

    asyncio.run(scenario())


def test_a_loss_is_recorded_after_the_preceding_step_checkpoint() -> None:
    """In the reverse order, the loss would have too early a step. The next loss would look like progress."""

    async def scenario() -> None:
        leases = FakeLeases([])
        request_recovery = recovery(leases)
        request_recovery.step_checkpoint.remember("origin", Packet(artifacts_pb2.DenoiseState(step=4), {}))
        await request_recovery.worker_lost("w", "denoising", 2)
        assert leases.saved == [4]
        assert len(leases.deaths) == 1

    asyncio.run(scenario())


def test_a_request_waits_for_a_decision_that_can_end_it() -> None:
    async def scenario() -> None:
        undecided = [QUIET, QUIET, loss(suspect=False, left=0.001)]
        cleared, suspected = FakeLeases(undecided, [QUIET, QUIET]), FakeLeases(undecided, [QUIET, QUIET, loss()])
        assert await recovery(cleared, epoch=2).wait_until_claimable()
        assert cleared.reads == 2
        with pytest.raises(InternalError, match=r"3 workers were lost .* the last one at denoising"):
            await recovery(suspected, epoch=2).wait_until_claimable()
        assert suspected.reads == 2

    asyncio.run(scenario())


def test_losses_are_reread_until_the_store_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_RETRY_SECONDS", 0.001)
    leases = FakeLeases(Unavailable("the store is unavailable"), Unavailable("the store is unavailable"), [QUIET])
    assert asyncio.run(recovery(leases, epoch=2).wait_until_claimable())
    assert leases.reads == 3
