"""Every RPC of GenerationService with the largest data. All responses are below gRPC's default limit of 4 MiB."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeAlias

import pytest
from google.protobuf.message import Message
from redis.asyncio import Redis

from common.errors import FailedPrecondition
from common.stage import Call
from common.state.connection import connect
from common.state.requests import PAGE_BYTES, RequestStore
from coordinator_fleet import FakeFleet, Stub, run_on_fleet, submission, terminal
from fleet.v1 import artifacts_pb2, worker_pb2
from fleet.v1 import generation_pb2 as pb
from redis_servers import running_server

GRPC_DEFAULT = 4 << 20
CHARACTER = "\N{FULL BLOCK}"  # three bytes of UTF-8
LONGEST_TEXT = CHARACTER * (64 * 1024 // 3)
RESULT_BYTES = 3 << 20
RECORDS = 16
GROUPS = 1_500

Case: TypeAlias = Callable[[Stub, str], Awaitable[list[Message]]]


@pytest.fixture(scope="module")
def unsynced_url() -> Iterator[str]:
    with running_server("valkey", "--appendfsync", "no") as server:
        yield server.url


def largest() -> pb.SubmitRequest:
    """A request with texts of the largest length."""
    text = artifacts_pb2.ParamValue(string_value=LONGEST_TEXT)
    parameters = pb.GenerationParameters(
        prompt=LONGEST_TEXT,
        negative_prompt=LONGEST_TEXT,
        true_cfg_scale=2.0,
        num_outputs_per_prompt=64,
        params={"prompt_2": text, "negative_prompt_2": text},
    )
    return pb.SubmitRequest(parameters=parameters)


def warn_and_fail(call: Call) -> None:
    """A stage that sends more and longer warnings than a record stores, and fails with a long message."""
    for _ in range(100):
        call.warn(CHARACTER * 1_000, CHARACTER * 10_000)
    raise FailedPrecondition(CHARACTER * 100_000, field=CHARACTER * 10_000)


def warn(call: Call) -> None:
    """A stage that sends more and longer warnings than a record stores."""
    for _ in range(100):
        call.warn(CHARACTER * 1_000, CHARACTER * 10_000)


async def store_records(redis: Redis, record: pb.RequestRecord) -> None:
    """Store RECORDS copies of a record."""
    store = RequestStore(redis)
    for number in range(RECORDS):
        copy = pb.RequestRecord()
        copy.CopyFrom(record)
        copy.request_id = f"copy{number}"
        await store.admit(copy)


async def announce_groups(redis: Redis, model: str) -> None:
    """Announce GROUPS worker groups with the largest metadata, without processes and heartbeats."""
    most = 2**32 - 1
    degrees = worker_pb2.Degrees(tp=most, ulysses=most, ring=most, cfg=most)
    async with redis.pipeline(transaction=False) as pipeline:
        for number in range(GROUPS):
            info = worker_pb2.WorkerInfo(worker_id=f"w{number}", capacity=1, degrees=degrees)
            fields: dict[Any, Any] = {"info": info.SerializeToString(), "capacity": 1, "granted": 0}
            pipeline.hset(f"fleet:worker:w{number}", mapping=fields)
            pipeline.zadd(f"fleet:workers:{model}/denoising", {f"w{number}": 1e15})
        await pipeline.execute()


async def submit(stub: Stub, _: str) -> list[Message]:
    return [await stub.Submit(largest())]


async def generate(stub: Stub, _: str) -> list[Message]:
    replies: list[Message] = [reply async for reply in stub.Generate(pb.GenerateRequest(request=largest()))]
    assert sum(len(reply.data) for reply in replies if isinstance(reply, pb.GenerateResponse)) == RESULT_BYTES
    return replies


async def watch(stub: Stub, request_id: str) -> list[Message]:
    replies: list[Message] = [reply async for reply in stub.Watch(pb.WatchRequest(request_id=request_id))]
    assert len(replies) > 60
    return replies


async def download(stub: Stub, request_id: str) -> list[Message]:
    call = stub.DownloadResult(pb.DownloadResultRequest(request_id=request_id))
    replies: list[Message] = [reply async for reply in call]
    assert len(replies) == 4
    return replies


async def get_request(stub: Stub, request_id: str) -> list[Message]:
    reply = await stub.GetRequest(pb.GetRequestRequest(request_id=request_id))
    assert 50 < len(reply.request.warnings) < 100
    return [reply]


async def cancel_request(stub: Stub, request_id: str) -> list[Message]:
    return [await stub.CancelRequest(pb.CancelRequestRequest(request_id=request_id))]


async def list_requests(stub: Stub, _: str) -> list[Message]:
    pages: list[pb.ListRequestsResponse] = []
    token, request_ids = "", []
    while token or not pages:
        page = await stub.ListRequests(pb.ListRequestsRequest(page_size=1_000, page_token=token))
        request_ids += [record.request_id for record in page.requests]
        token = page.next_page_token
        pages.append(page)
    assert len(request_ids) == len(set(request_ids)) > RECORDS
    assert len(pages) > 2
    assert all(page.ByteSize() > PAGE_BYTES // 2 for page in pages[:-1])
    return list(pages)


async def list_models(stub: Stub, _: str) -> list[Message]:
    reply = await stub.ListModels(pb.ListModelsRequest())
    [denoising] = [each for each in reply.models[0].services if each.service == "denoising"]
    assert denoising.workers >= GROUPS
    assert len(denoising.groups) == 1_000
    return [reply]


CASES: dict[str, Case] = {
    "Submit": submit,
    "Generate": generate,
    "Watch": watch,
    "DownloadResult": download,
    "GetRequest": get_request,
    "CancelRequest": cancel_request,
    "ListRequests": list_requests,
    "ListModels": list_models,
}


def test_all_replies_are_below_grpcs_default_limit(unsynced_url: str) -> None:
    service = pb.DESCRIPTOR.services_by_name["GenerationService"]
    assert [method.name for method in service.methods] == list(CASES), "an RPC has no case"

    async def scenario(fleet: FakeFleet) -> None:
        fleet.scripts["denoising"].work = warn
        fleet.scripts["decoding"].result_bytes = RESULT_BYTES
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        request_id = (await stub.Submit(largest())).request.request_id
        assert (await terminal(stub, request_id))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        async with connect(unsynced_url) as redis:
            record = (await stub.GetRequest(pb.GetRequestRequest(request_id=request_id))).request
            await store_records(redis, record)
            sizes = {
                name: max(reply.ByteSize() for reply in await case(stub, request_id))
                for name, case in CASES.items()
                if name != "ListModels"
            }
            await announce_groups(redis, fleet.model.name)  # last, as requests cannot run on these groups
            sizes["ListModels"] = max(reply.ByteSize() for reply in await list_models(stub, request_id))
        assert {name: size for name, size in sizes.items() if size >= GRPC_DEFAULT} == {}

    run_on_fleet(unsynced_url, scenario)


def test_error_of_a_failed_request_is_truncated(unsynced_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        fleet.scripts["denoising"].work = warn_and_fail
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        request_id = (await stub.Submit(submission())).request.request_id
        last = (await terminal(stub, request_id))[-1]
        assert last.state_change.state == pb.REQUEST_STATE_FAILED
        assert len(last.state_change.error.message) == 2_048 // 3
        assert last.ByteSize() < 16 << 10

    run_on_fleet(unsynced_url, scenario)
