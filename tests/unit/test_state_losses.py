"""Losses of workers during calls, against real servers: suspect losses, and losses in churn."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from async_tests import wait_until
from common.state.connection import run_script
from common.state.leases import Leases, Loss
from common.state.requests import RequestStore
from common.state.workers import WorkerRegistry
from fleet.v1 import generation_pb2, worker_pb2
from redis_servers import run_on_empty_store

SLOW = 3_600.0
TTL = 0.15
State = generation_pb2.RequestState


class Case:
    """A request of a coordinator, and workers whose heartbeats the test sends."""

    def __init__(self, redis: Redis, ttl_seconds: float = TTL) -> None:
        self.redis = redis
        self.registry = WorkerRegistry(redis, heartbeat_seconds=SLOW, ttl_seconds=ttl_seconds)
        self.leases = Leases(redis, "me")
        self.store = RequestStore(redis, owner="me")

    async def admit(self, name: str = "r") -> None:
        await self.store.admit(generation_pb2.RequestRecord(request_id=name, model="emoji"))

    async def announce(self, worker_id: str, service: str = "denoising") -> None:
        """Send one heartbeat."""
        info = worker_pb2.WorkerInfo(
            worker_id=worker_id, service=service, model="emoji", model_fingerprint="f", capacity=1
        )
        await self.registry.announce(info)

    async def lose(self, worker_id: str, *, name: str = "r", service: str = "denoising", epoch: int = 1) -> list[Loss]:
        """Record that a running call was lost with its worker."""
        return await self.leases.add_death(name, epoch, worker_id, service=service, stage=2, ttl_seconds=TTL)

    async def decided(self, name: str = "r", epoch: int = 1) -> list[Loss]:
        """The suspect losses, once every loss is suspect or cleared."""

        async def all_are() -> bool:
            return all(loss.suspect for loss in await self.leases.losses(name, epoch))

        await wait_until(all_are)
        return await self.leases.losses(name, epoch)


def test_a_loss_is_suspect_once_the_heartbeat_has_expired(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        case = Case(redis)
        await case.admit()
        await case.announce("w")
        (loss,) = await case.lose("w")
        assert (loss.worker_id, loss.service, loss.stage, loss.reached) == ("w", "denoising", 2, 0)
        assert not loss.suspect
        assert 0 < loss.undecided_seconds <= TTL
        assert len(await case.lose("w")) == 1  # recorded again after a lost reply
        (loss,) = await case.decided()
        assert loss.suspect
        assert loss.undecided_seconds == 0
        await case.announce("w")  # the worker was suspended for longer than its heartbeat lasts
        assert [each.suspect for each in await case.leases.losses("r", 1)] == [True]
        # This worker has no heartbeat before its loss; the wait for a decision is as long as for other losses.
        (first, second) = await case.lose("unknown")
        assert (first.worker_id, second.worker_id, second.suspect) == ("w", "unknown", False)
        assert [loss.suspect for loss in await case.decided()] == [True, True]

    run_on_empty_store(each_store_url, scenario)


def test_a_new_heartbeat_of_the_worker_clears_its_losses(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        case = Case(redis, ttl_seconds=SLOW)
        await case.admit()
        await case.admit("other")
        await case.announce("w")
        await case.lose("w")
        await case.lose("w", name="other")
        assert await redis.zrange("fleet:lost:emoji/denoising", 0, -1) == [b"w"]
        await case.announce("w")
        assert await case.leases.losses("r", 1) == []
        assert await case.leases.losses("other", 1) == []
        assert await redis.zrange("fleet:lost:emoji/denoising", 0, -1) == []
        assert [loss.worker_id for loss in await case.lose("w")] == ["w"]  # a later loss counts

    run_on_empty_store(each_store_url, scenario)


def test_a_worker_that_leaves_is_not_a_loss(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        case = Case(redis, ttl_seconds=60)
        await case.admit()
        for worker_id in ("before", "after"):
            await case.announce(worker_id)
        await case.registry.withdraw("before", grace_seconds=SLOW)
        assert await case.lose("before") == []
        assert len(await case.lose("after")) == 1
        await case.registry.withdraw("after")  # the worker is marked as leaving after its loss
        assert await case.leases.losses("r", 1) == []
        assert await redis.zrange("fleet:lost:emoji/denoising", 0, -1) == []
        assert SLOW * 1_000 < await redis.pttl("fleet:leaving:before") <= (SLOW + 60) * 1_000
        assert 0 < await redis.pttl("fleet:leaving:after") <= 60_000
        await case.announce("before")  # a delayed heartbeat
        assert await case.registry.live("emoji", "denoising") == []

    run_on_empty_store(each_store_url, scenario)


def test_a_loss_has_the_step_of_the_step_checkpoint_and_is_inherited(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        case = Case(redis)
        await case.admit()
        await case.lose("w-1")
        assert await case.leases.save_step_checkpoint("r", 1, 0, [b"x"], step=4)
        await case.lose("w-2")
        assert await case.leases.save_step_checkpoint("r", 1, 1, [b"x"], step=6)
        assert not await case.leases.save_step_checkpoint("r", 1, 0, [b"x"], step=4)  # a late write
        await redis.set("fleet:coordinator:successor", "1")
        successor = Leases(redis, "successor")
        ((inherited,), _) = await successor.take_over("emoji")
        assert await case.leases.losses("r", 1) == []  # this coordinator is no longer the owner
        assert await case.lose("w-3") == []
        await successor.add_death("r", inherited.epoch, "w-3", service="denoising", stage=2, ttl_seconds=TTL)
        found = await case.decided(epoch=inherited.epoch)
        assert [(loss.worker_id, loss.reached) for loss in found] == [("w-1", 0), ("w-2", 4), ("w-3", 6)]
        assert await RequestStore(redis, owner="successor").finish("r", State.REQUEST_STATE_FAILED, epoch=2) is not None
        assert not {b"deaths", b"reached"} & set(await redis.hkeys("fleet:request:r"))
        for key in await redis.keys("fleet:*lost:*") + await redis.keys("fleet:accused:*"):
            assert await redis.pttl(key) > 0, key

    run_on_empty_store(each_store_url, scenario)


@pytest.mark.parametrize("seen_by", ["heartbeat", "coordinator"])
def test_a_loss_is_in_churn_if_a_worker_of_other_requests_was_lost(each_store_url: str, seen_by: str) -> None:
    async def scenario(redis: Redis) -> None:
        case = Case(redis)
        for name in ("r", "other"):
            await case.admit(name)
        for worker_id in ("w-1", "w-2"):
            await case.announce(worker_id)
            await case.lose(worker_id)
        assert [loss.in_churn for loss in await case.decided()] == [False, False]  # both workers ran the request
        await case.lose("elsewhere", name="other", service="decoding")
        await case.announce("leaves")
        await case.registry.withdraw("leaves", grace_seconds=SLOW)
        seconds, _ = await redis.time()
        await redis.zadd("fleet:workers:emoji/denoising", {"leaves": seconds * 1_000})  # as after a late heartbeat
        assert not any(loss.in_churn for loss in await case.leases.losses("r", 1))
        if seen_by == "heartbeat":
            await redis.zadd("fleet:workers:emoji/denoising", {"unrelated": seconds * 1_000})
        else:
            await case.lose("unrelated", name="other")
        assert all(loss.in_churn for loss in await case.decided())
        await redis.delete("fleet:lost:emoji/denoising")  # entries expire after 10 minutes
        assert all(loss.in_churn for loss in await case.decided())

    run_on_empty_store(each_store_url, scenario)


def test_losses_of_more_than_ten_minutes_ago_are_not_churn(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        case = Case(redis)
        await case.admit()
        seconds, _ = await redis.time()
        await redis.zadd("fleet:lost:emoji/denoising", {"long ago": seconds * 1_000 - 601_000})
        await case.lose("w")
        assert [loss.in_churn for loss in await case.decided()] == [False]
        assert await redis.zrange("fleet:lost:emoji/denoising", 0, -1) == [b"w"]
        await redis.zadd("fleet:lost:emoji/denoising", {"just now": seconds * 1_000 - 590_000})
        assert [loss.in_churn for loss in await case.decided()] == [True]

    run_on_empty_store(each_store_url, scenario)


def test_a_worker_that_runs_an_older_script_is_cleared_by_its_heartbeat(each_store_url: str) -> None:
    """Heartbeats of an older script store no TTL and clear no loss.

    A loss is cleared if the worker's key still exists when the loss is decided.
    """

    async def scenario(redis: Redis) -> None:
        case = Case(redis, ttl_seconds=SLOW)
        await case.admit()
        await case.announce("old-1")
        await case.announce("old-2")
        for worker_id in ("old-1", "old-2"):
            await redis.hdel(f"fleet:worker:{worker_id}", "lasts")
        await redis.persist("fleet:worker:old-1")  # the worker continues to send heartbeats
        await redis.pexpire("fleet:worker:old-2", 1)
        for worker_id in ("old-1", "old-2"):
            await case.lose(worker_id)
        assert [loss.worker_id for loss in await case.decided()] == ["old-2"]
        await run_script(redis, "leaving", {"worker": "old-1", "lasts": 1})

    run_on_empty_store(each_store_url, scenario)
