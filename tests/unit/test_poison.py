"""The rule by which a request is given up, and how a request waits for it."""

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
        ([loss(4)] * 5, 3),  # kills its worker at step 5, after a checkpoint at step 4
        ([loss(0), loss(4), loss(4), loss(4)], 4),  # the first death came before the first checkpoint
        ([loss(4), loss(4), loss(5), loss(5), loss(5)], 5),
        ([loss(step) for step in range(20)], 10),  # kills at ever later steps
        ([loss(4), loss(4), loss(3), loss(4)], 3),  # began again at step 0: that is no progress
        ([loss(4), loss(4), loss(4, stage=3), loss(4, stage=3), loss(4, stage=3)], 5),  # a later service
        ([loss(4), loss(4), loss(4, stage=0)], 3),  # an earlier one, after a take-over
        ([QUIET, QUIET, CHURN] + [QUIET] * 10, 10),
        ([CHURN] * 12, 10),
        ([loss(step, churn=True) for step in range(100)], None),  # progress, in churn: innocent however often
        ([loss(step // 9, churn=True) for step in range(100)], None),
        ([CHURN] * 9 + [loss(1)] * 2, None),
        ([CHURN] * 9 + [loss(1)] * 3, 12),
        ([loss(step, churn=step % 2 == 0) for step in range(40)], 20),  # 10 of them outside churn
    ],
)
def test_a_request_is_given_up_after(losses: list[Loss], given_up_after: int | None) -> None:
    counts = range(len(losses) + 1)
    first = next((count for count in counts if reason_to_give_up(losses[:count])), None)
    assert first == given_up_after


def test_the_reason_names_the_count() -> None:
    assert reason_to_give_up([QUIET] * 3).startswith(
        "3 workers were lost while they ran this request, without progress"
    )
    assert reason_to_give_up([loss(step) for step in range(10)]).startswith("10 workers were lost")


class Book(Leases):
    """Losses as a test wants them: one list each time that it is asked, the last one for ever."""

    def __init__(self, *answers: list[Loss] | Exception) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.deaths: list[tuple[str, str, int]] = []
        self.saved: list[int] = []

    async def losses(self, request_id: str, epoch: int) -> list[Loss]:
        del request_id, epoch
        self.asked += 1
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


def recovery(book: Book, epoch: int = 1) -> Recovery:
    return Recovery(book, "r", epoch=epoch)


def test_a_request_without_losses_asks_nothing() -> None:
    book = Book([QUIET])
    assert not asyncio.run(recovery(book).wait_until_claimable())
    assert book.asked == 0


def test_after_a_loss_a_request_is_claimed_alone_until_the_loss_is_cleared() -> None:
    async def story() -> None:
        book = Book([loss(suspect=False, left=5.0)], [])
        mine = recovery(book)
        await mine.worker_lost("w", "denoising", 2)
        assert book.deaths == [("w", "denoising", 2)]
        assert await mine.wait_until_claimable()  # undecided: it goes on at once, and alone
        assert not await mine.wait_until_claimable()
        assert not await mine.wait_until_claimable()
        assert book.asked == 2

    asyncio.run(story())


def test_a_loss_is_recorded_after_the_checkpoint_before_it() -> None:
    """Or it would look as if the request had come less far, and the next loss as if it had made progress."""

    async def story() -> None:
        book = Book([])
        mine = recovery(book)
        mine.step_checkpoint.remember("origin", Packet(artifacts_pb2.DenoiseState(step=4), {}))
        await mine.worker_lost("w", "denoising", 2)
        assert book.saved == [4]
        assert len(book.deaths) == 1

    asyncio.run(story())


def test_a_request_waits_for_the_decision_that_would_end_it() -> None:
    async def story() -> None:
        undecided = [QUIET, QUIET, loss(suspect=False, left=0.001)]
        innocent, guilty = Book(undecided, [QUIET, QUIET]), Book(undecided, [QUIET, QUIET, loss()])
        assert await recovery(innocent, epoch=2).wait_until_claimable()
        assert innocent.asked == 2
        with pytest.raises(InternalError, match=r"3 workers were lost .* the last one in denoising"):
            await recovery(guilty, epoch=2).wait_until_claimable()
        assert guilty.asked == 2

    asyncio.run(story())


def test_losses_are_asked_for_until_the_store_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_RETRY_SECONDS", 0.001)
    book = Book(Unavailable("away"), Unavailable("away"), [QUIET])
    assert asyncio.run(recovery(book, epoch=2).wait_until_claimable())
    assert book.asked == 3
