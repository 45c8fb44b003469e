"""The public API from submission to download, with a real store, real gRPC and scripted stages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Any

import grpc
import pytest

from async_tests import wait_until
from common.stage import Call
from common.state.connection import connect
from coordinator_fleet import FakeFleet, Gate, Script, error_of, run_on_fleet, submission, submit_expiring, terminal
from fleet.v1 import generation_pb2 as pb
from late_faults import longer_each_time


def steps(count: int) -> Callable[[Call], None]:
    def work(call: Call) -> None:
        for step in range(count):
            call.progress(step + 1, count)

    return work


def test_request_is_submitted_watched_and_downloaded(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        fleet.scripts["denoising"].work = steps(4)
        fleet.scripts["decoding"].result_bytes = 2_500_000
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        request = submission(priority=3)
        request.parameters.num_inference_steps = 4
        accepted = (await stub.Submit(request)).request
        assert accepted.state == pb.REQUEST_STATE_QUEUED
        assert accepted.parameters.height == 128
        assert accepted.parameters.HasField("seed")
        events = await terminal(stub, accepted.request_id)
        states = [event.state_change.state for event in events if event.HasField("state_change")]
        assert states == [pb.REQUEST_STATE_QUEUED, pb.REQUEST_STATE_RUNNING, pb.REQUEST_STATE_SUCCEEDED]
        progress = [
            (event.progress.service, event.progress.step, event.progress.total_steps)
            for event in events
            if event.HasField("progress")
        ]
        for service, total in [("text_encoding", 1), ("latent_preparation", 1), ("denoising", 4), ("decoding", 1)]:
            assert (service, 0, total) in progress
            assert (service, total, total) in progress
        record = (await stub.GetRequest(pb.GetRequestRequest(request_id=accepted.request_id))).request
        assert record.state == pb.REQUEST_STATE_SUCCEEDED
        assert record.priority == 3
        assert record.files[0].byte_size == 2_500_000
        replies = [reply async for reply in stub.DownloadResult(pb.DownloadResultRequest(request_id=record.request_id))]
        assert replies[0].file == record.files[0]
        assert b"".join(reply.data for reply in replies) == b"\x07" * 2_500_000
        assert max(len(reply.data) for reply in replies) == 1 << 20
        later = events[3].event_id
        rest = [r async for r in stub.Watch(pb.WatchRequest(request_id=record.request_id, after_event_id=later))]
        assert [response.event for response in rest] == events[4:]

    run_on_fleet(each_store_url, scenario)


def test_generate_returns_stored_and_raw_results(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        fleet.scripts["decoding"].result_bytes = 1_500_000
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        for output_format, num_stored in [(pb.OUTPUT_FORMAT_UNSPECIFIED, 2), (pb.OUTPUT_FORMAT_SAFETENSORS, 0)]:
            request = submission()
            request.parameters.output_format = output_format
            replies = [reply async for reply in stub.Generate(pb.GenerateRequest(request=request))]
            kinds = [reply.WhichOneof("payload") for reply in replies]
            assert kinds[0] == "accepted"
            assert kinds[-3:] == ["file", "data", "data"]
            assert set(kinds[1:-3]) == {"event"}
            assert b"".join(reply.data for reply in replies) == b"\x07" * 1_500_000
            request_id = replies[0].accepted.request_id
            download = pb.DownloadResultRequest(request_id=request_id)
            if num_stored:
                assert len([each async for each in stub.DownloadResult(download)]) == 1 + num_stored
            else:
                with pytest.raises(grpc.aio.AioRpcError, match="never stored") as caught:
                    [each async for each in stub.DownloadResult(download)]
                assert error_of(caught.value)[0] == "FAILED_PRECONDITION"

    run_on_fleet(each_store_url, scenario)


def test_request_fails_if_its_raw_result_exceeds_the_bound(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator(max_raw_result_bytes=99)
        request = submission()
        request.parameters.output_format = pb.OUTPUT_FORMAT_SAFETENSORS
        replies = [reply async for reply in stub.Generate(pb.GenerateRequest(request=request))]
        error = replies[-1].event.state_change.error
        assert (error.code, error.field) == ("RESOURCE_EXHAUSTED", "output_format")

    run_on_fleet(each_store_url, scenario)


def test_idempotency_key_identifies_one_request(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        _, one = await fleet.add_coordinator()
        _, two = await fleet.add_coordinator()
        answers = await asyncio.gather(
            *(stub.Submit(submission(idempotency_key="k")) for stub in (one, two) for _ in range(5))
        )
        names = {answer.request.request_id for answer in answers}
        assert len(names) == 1
        assert sum(not answer.replayed for answer in answers) == 1
        await terminal(one, names.pop())
        for stub in (one, two):
            replies = [r async for r in stub.Generate(pb.GenerateRequest(request=submission(idempotency_key="k")))]
            assert b"".join(reply.data for reply in replies) == b"\x07" * 100
        assert len(fleet.scripts["decoding"].calls) == 1

    run_on_fleet(each_store_url, scenario)


def test_cancel_ends_a_running_request_within_a_step(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        _, one = await fleet.add_coordinator()
        _, other = await fleet.add_coordinator()
        for canceller in (one, other):
            gate.reached.clear()
            name = (await one.Submit(submission())).request.request_id
            await gate.wait_reached()
            await canceller.CancelRequest(pb.CancelRequestRequest(request_id=name))
            assert (await terminal(other, name))[-1].state_change.state == pb.REQUEST_STATE_CANCELLED
        again = await one.CancelRequest(pb.CancelRequestRequest(request_id=name))
        assert again.request.state == pb.REQUEST_STATE_CANCELLED
        gate.opened.set()
        name = (await one.Submit(submission())).request.request_id
        assert (await terminal(one, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

    run_on_fleet(each_store_url, scenario)


def test_queued_request_can_be_cancelled_or_expire(each_store_url: str) -> None:
    seconds = longer_each_time(0.3)

    async def scenario(fleet: FakeFleet) -> None:
        _, stub = await fleet.add_coordinator()
        queued = (await stub.Submit(submission())).request.request_id
        expired = await submit_expiring(stub, submission(), next(seconds))
        await stub.CancelRequest(pb.CancelRequestRequest(request_id=queued))
        for name, end in [(queued, pb.REQUEST_STATE_CANCELLED), (expired, pb.REQUEST_STATE_EXPIRED)]:
            events = await terminal(stub, name)
            states = [event.state_change.state for event in events if not event.HasField("warning")]
            assert states == [pb.REQUEST_STATE_QUEUED, end]
        listed = await stub.ListModels(pb.ListModelsRequest())
        assert [service.queued for service in listed.models[0].services] == [0, 0, 0, 0]

    run_on_fleet(each_store_url, scenario)


def test_disconnecting_from_generate_cancels_only_without_an_idempotency_key(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        end_by_key = {"": pb.REQUEST_STATE_CANCELLED, "k": pb.REQUEST_STATE_SUCCEEDED}
        for key, end in end_by_key.items():
            gate.reached.clear()
            call = stub.Generate(pb.GenerateRequest(request=submission(idempotency_key=key)))
            name = (await anext(aiter(call))).accepted.request_id
            await gate.wait_reached()
            call.cancel()
            watch = stub.Watch(pb.WatchRequest(request_id=name))
            await anext(aiter(watch))
            watch.cancel()
            if key:
                gate.opened.set()
            assert (await terminal(stub, name))[-1].state_change.state == end

    run_on_fleet(each_store_url, scenario)


def test_lost_worker_is_replaced_and_stage_error_is_reported(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        script = Script(fleet.scripts["denoising"].contract, gate)
        await fleet.add_workers(["text_encoding", "latent_preparation", "decoding"])
        first = await fleet.add_worker("denoising", script)
        _, stub = await fleet.add_coordinator()
        name = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        await fleet.add_worker("denoising")
        await first.die()
        assert (await terminal(stub, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        assert len(fleet.scripts["denoising"].calls) == 1
        await first.withdraw()

        def fail(_: Call) -> None:
            raise ZeroDivisionError("a failed division")

        fleet.scripts["decoding"].work = fail
        name = (await stub.Submit(submission())).request.request_id
        change = (await terminal(stub, name))[-1].state_change
        assert change.state == pb.REQUEST_STATE_FAILED
        assert change.error.code == "INTERNAL"
        assert "a failed division" in change.error.message

    run_on_fleet(each_store_url, scenario)


def test_unreachable_workers_do_not_count_as_attempts(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        for _ in range(4):
            await (await fleet.add_worker("text_encoding")).hang_up()
        await fleet.add_workers(["latent_preparation", "denoising", "decoding"])
        _, stub = await fleet.add_coordinator()
        name = (await stub.Submit(submission())).request.request_id
        async with connect(fleet.url) as redis:

            async def all_are_avoided() -> bool:
                keys = await redis.keys("fleet:avoided:*")
                return bool(keys) and await redis.hlen(keys[0]) == 4

            await wait_until(all_are_avoided)
            assert not await redis.hexists(f"fleet:request:{name}", "deaths")
            assert await redis.zcard("fleet:workers:emoji/text_encoding") == 4  # avoided workers still send heartbeats
        await fleet.add_worker("text_encoding")
        assert (await terminal(stub, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

    run_on_fleet(each_store_url, scenario)


def test_request_fails_if_no_worker_can_be_reached(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await (await fleet.add_worker("text_encoding")).hang_up()
        await fleet.add_workers(["latent_preparation"])
        _, stub = await fleet.add_coordinator(worker_wait_seconds=0.5)
        name = (await stub.Submit(submission())).request.request_id
        change = (await terminal(stub, name))[-1].state_change
        assert change.error.code == "UNAVAILABLE"
        assert "no worker of text_encoding was reachable for 0.5 s; last error: " in change.error.message

    run_on_fleet(each_store_url, scenario)


def test_requests_succeed_on_a_worker_with_fewer_worker_slots_than_announced(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        await fleet.add_workers(["latent_preparation", "denoising", "decoding"])
        fleet.scripts["text_encoding"].work = gate
        await fleet.add_worker("text_encoding", announced=3)
        _, stub = await fleet.add_coordinator()
        names = [(await stub.Submit(submission())).request.request_id for _ in range(3)]
        await gate.wait_reached()
        gate.opened.set()
        for name in names:
            assert (await terminal(stub, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

    run_on_fleet(each_store_url, scenario)


def test_request_fails_if_no_worker_appears_within_worker_wait_seconds(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        _, stub = await fleet.add_coordinator(worker_wait_seconds=0.1)
        name = (await stub.Submit(submission())).request.request_id
        change = (await terminal(stub, name))[-1].state_change
        assert change.error.code == "UNAVAILABLE"
        assert "no worker has served emoji/" in change.error.message

    run_on_fleet(each_store_url, scenario)


def test_stage_warnings_reach_events_and_record(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        fleet.scripts["text_encoding"].work = lambda call: call.warn("prompt", "truncated after 64 tokens")
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        request = submission()
        request.parameters.height = 130
        accepted = (await stub.Submit(request)).request
        events = await terminal(stub, accepted.request_id)
        warned = [event.warning.field for event in events if event.HasField("warning")]
        assert warned == ["height", "prompt"]
        record = (await stub.GetRequest(pb.GetRequestRequest(request_id=accepted.request_id))).request
        assert [warning.field for warning in record.warnings] == warned
        assert record.parameters.height == 128

    run_on_fleet(each_store_url, scenario)


def test_requests_are_listed_in_pages_from_the_newest(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        _, stub = await fleet.add_coordinator()
        names = [(await stub.Submit(submission(str(number)))).request.request_id for number in range(5)]
        page = await stub.ListRequests(pb.ListRequestsRequest(page_size=3))
        assert [each.parameters.prompt for each in page.requests] == ["4", "3", "2"]
        rest = await stub.ListRequests(pb.ListRequestsRequest(page_token=page.next_page_token, model="emoji"))
        assert [each.request_id for each in rest.requests] == names[1::-1]
        assert rest.next_page_token == ""

    run_on_fleet(each_store_url, scenario)


def test_full_fleet_refuses_submissions(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        _, stub = await fleet.add_coordinator(max_open_requests=2)
        first = (await stub.Submit(submission())).request.request_id
        await stub.Submit(submission())
        with pytest.raises(grpc.aio.AioRpcError, match="2 requests for emoji are open") as caught:
            await stub.Submit(submission())
        assert error_of(caught.value)[0] == "RESOURCE_EXHAUSTED"
        await stub.CancelRequest(pb.CancelRequestRequest(request_id=first))
        await terminal(stub, first)
        await stub.Submit(submission())

    run_on_fleet(each_store_url, scenario)


def test_models_are_listed_with_parameters_and_workers(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_worker("denoising", capacity=3)
        _, stub = await fleet.add_coordinator()
        (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
        assert (model.name, model.pipeline_name) == ("emoji", "FluxPipeline")
        assert [service.service for service in model.services] == list(fleet.scripts)
        assert [(each.workers, each.capacity) for each in model.services] == [(0, 0), (0, 0), (1, 3), (0, 0)]
        parameters = {each.name: each for each in model.parameters}
        assert parameters["height"].default_value.int_value == 128
        assert parameters["prompt"].type == "string"
        assert not parameters["prompt"].HasField("default_value")

    run_on_fleet(each_store_url, scenario)


async def _refusal(call: Awaitable[Any] | AsyncIterable[Any]) -> tuple[str, str]:
    """Code and field of a call's error."""

    async def finish() -> None:
        if isinstance(call, AsyncIterable):
            async for _ in call:
                pass
        else:
            await call

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await finish()
    return error_of(caught.value)


def test_invalid_input_is_refused_with_its_field(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        _, stub = await fleet.add_coordinator()
        nan = submission()
        nan.parameters.guidance_scale = float("nan")
        raw, height_in_params, unknown_parameter, video = submission(), submission(), submission(), submission()
        raw.parameters.output_format = pb.OUTPUT_FORMAT_SAFETENSORS
        height_in_params.parameters.params["height"].int_value = 1
        unknown_parameter.parameters.params["color"].string_value = "red"
        video.parameters.output_format = pb.OUTPUT_FORMAT_MP4
        with_image = submission()
        with_image.parameters.images.add(data=b"x")
        past = submission()
        past.deadline.seconds = 1
        never = submission()
        never.deadline.seconds = -1
        invalid = {
            "model": submission(model="mona-lisa"),
            "guidance_scale": nan,
            "height": height_in_params,
            "color": unknown_parameter,
            "images": with_image,
            "idempotency_key": submission(idempotency_key="k" * 129),
            "priority": submission(priority=101),
            "prompt": submission("x" * (64 * 1024 + 1)),
        }
        for name, request in invalid.items():
            assert await _refusal(stub.Submit(request)) == ("INVALID_ARGUMENT", name)
            assert await _refusal(stub.Generate(pb.GenerateRequest(request=request))) == ("INVALID_ARGUMENT", name)
        for request, name in [
            (raw, "output_format"),
            (video, "output_format"),
            (past, "deadline"),
            (never, "deadline"),
        ]:
            assert await _refusal(stub.Submit(request)) == ("INVALID_ARGUMENT", name)
        raw.idempotency_key = "k"
        assert await _refusal(stub.Generate(pb.GenerateRequest(request=raw))) == ("INVALID_ARGUMENT", "idempotency_key")
        listed = await stub.ListRequests(pb.ListRequestsRequest())
        assert not listed.requests

    run_on_fleet(each_store_url, scenario)


def test_calls_about_unknown_requests_are_not_found(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        _, stub = await fleet.add_coordinator()
        name = (await stub.Submit(submission())).request.request_id
        for unknown in ("nothing", "", "x y", "9" * 100):
            for call in (
                stub.GetRequest(pb.GetRequestRequest(request_id=unknown)),
                stub.CancelRequest(pb.CancelRequestRequest(request_id=unknown)),
                stub.Watch(pb.WatchRequest(request_id=unknown)),
                stub.DownloadResult(pb.DownloadResultRequest(request_id=unknown)),
            ):
                assert await _refusal(call) == ("NOT_FOUND", "request_id")
        early = stub.DownloadResult(pb.DownloadResultRequest(request_id=name))
        assert (await _refusal(early))[0] == "FAILED_PRECONDITION"
        watch = stub.Watch(pb.WatchRequest(request_id=name, after_event_id="x"))
        assert await _refusal(watch) == ("INVALID_ARGUMENT", "after_event_id")
        page = pb.ListRequestsRequest(page_size=1001)
        assert await _refusal(stub.ListRequests(page)) == ("INVALID_ARGUMENT", "page_size")

    run_on_fleet(each_store_url, scenario)


def test_invalid_utf8_unknown_fields_and_oversized_messages_are_refused(each_store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        coordinator, _ = await fleet.add_coordinator()
        async with grpc.aio.insecure_channel(coordinator.address) as channel:
            submit: Any = channel.unary_unary("/fleet.v1.GenerationService/Submit")
            prompt = b"\x0a\x02\xff\xfe"
            assert await _refusal(submit(b"\x12" + bytes([len(prompt)]) + prompt)) == (
                "INVALID_ARGUMENT",
                "parameters.prompt",
            )
            assert (await _refusal(submit(b"\xa0\x06\x01")))[0] == "INVALID_ARGUMENT"
            assert (await _refusal(submit(b"\xff")))[0] == "INVALID_ARGUMENT"
            assert (await _refusal(submit(b"\x00" * (49 << 20))))[0] == "RESOURCE_EXHAUSTED"

    run_on_fleet(each_store_url, scenario)
