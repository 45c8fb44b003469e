"""Callers send API keys or tokens, access only their own requests, and have bounds on open requests."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from async_tests import wait_until
from common.errors import InvalidInput, Unauthenticated
from common.rpc.client import open_channel
from common.state.connection import connect
from coordinator_fleet import FakeFleet, Gate, Script, error_of, run_on_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb
from services.coordinator.callers import ByBearer, Caller, admission, read_keys
from services.coordinator.settings import CoordinatorSettings
from tokens import AUDIENCE, ISSUER, jwk, jwk_set, public_pem, token

ALICE, BOB = "key-of-alice", "key-of-bob"
UNKNOWN = "00000000deadbeef"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(
        f'[callers.alice]\nkey_sha256 = ["{digest(ALICE)}", "{digest("next")}"]\nmax_open = 1\n'
        f'[callers."bob@studio"]\nkey_sha256 = ["{digest(BOB)}"]\n'
    )
    return path


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def code_and_message(call: Any) -> tuple[str, str]:
    """Code and message of the error of a unary or streaming call."""

    async def end() -> None:
        if not isinstance(call, grpc.aio.UnaryStreamCall):
            await call
            return
        async for _ in call:
            continue

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await end()
    return error_of(caught.value)[0], caught.value.details() or ""


def test_every_rpc_needs_a_key_and_health_does_not(store_url: str, keys: Path) -> None:
    async def scenario(running: FakeFleet) -> None:
        coordinator, stub = await running.add_coordinator(api_keys=keys)
        calls = (
            lambda metadata: stub.Submit(submission(), metadata=metadata),
            lambda metadata: stub.Generate(pb.GenerateRequest(request=submission()), metadata=metadata),
            lambda metadata: stub.Watch(pb.WatchRequest(request_id=UNKNOWN), metadata=metadata),
            lambda metadata: stub.DownloadResult(pb.DownloadResultRequest(request_id=UNKNOWN), metadata=metadata),
            lambda metadata: stub.GetRequest(pb.GetRequestRequest(request_id=UNKNOWN), metadata=metadata),
            lambda metadata: stub.CancelRequest(pb.CancelRequestRequest(request_id=UNKNOWN), metadata=metadata),
            lambda metadata: stub.ListRequests(pb.ListRequestsRequest(), metadata=metadata),
            lambda metadata: stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
        )
        assert len(calls) == len(pb.DESCRIPTOR.services_by_name["GenerationService"].methods)
        wrong = ((), bearer("key"), bearer(""), (("authorization", ALICE),), bearer(ALICE) + bearer(BOB))
        for call in calls:
            for metadata in wrong:
                assert (await code_and_message(call(metadata)))[0] == "UNAUTHENTICATED"
        async with connect(store_url) as redis:
            assert not await redis.exists("fleet:requests")
        async with open_channel(coordinator.address) as channel:
            check: Any = channel.unary_unary(
                "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
            )
            assert (await check(b"")).status == health_pb2.HealthCheckResponse.SERVING

    run_on_fleet(store_url, scenario)


def test_callers_see_only_their_own_requests(store_url: str, keys: Path) -> None:
    async def scenario(running: FakeFleet) -> None:
        await running.add_workers()
        _, stub = await running.add_coordinator(api_keys=keys)
        alice, bob = bearer(ALICE), bearer(BOB)
        request = submission(idempotency_key="k")
        created = (await stub.Submit(request, metadata=alice)).request
        assert created.caller == "alice"
        assert (await stub.Submit(request, metadata=bearer("next"))).replayed
        other = await stub.Submit(request, metadata=bob)
        assert not other.replayed
        assert other.request.request_id != created.request_id

        unknown = (await code_and_message(stub.GetRequest(pb.GetRequestRequest(request_id=UNKNOWN), metadata=bob)))[1]
        for call in (
            stub.GetRequest(pb.GetRequestRequest(request_id=created.request_id), metadata=bob),
            stub.CancelRequest(pb.CancelRequestRequest(request_id=created.request_id), metadata=bob),
            stub.Watch(pb.WatchRequest(request_id=created.request_id), metadata=bob),
            stub.DownloadResult(pb.DownloadResultRequest(request_id=created.request_id), metadata=bob),
        ):
            code, message = await code_and_message(call)
            assert code == "NOT_FOUND"
            assert message == unknown.replace(UNKNOWN, created.request_id)

        events = [reply async for reply in stub.Watch(pb.WatchRequest(request_id=created.request_id), metadata=alice)]
        assert events[-1].event.state_change.state == pb.REQUEST_STATE_SUCCEEDED
        download = pb.DownloadResultRequest(request_id=created.request_id)
        assert [reply async for reply in stub.DownloadResult(download, metadata=alice)]
        for metadata, own in ((alice, created.request_id), (bob, other.request.request_id)):
            listed = await stub.ListRequests(pb.ListRequestsRequest(), metadata=metadata)
            assert [record.request_id for record in listed.requests] == [own]

        _, without_keys = await running.add_coordinator()
        assert len((await without_keys.ListRequests(pb.ListRequestsRequest())).requests) == 2

    run_on_fleet(store_url, scenario)


def test_open_requests_are_bounded_per_caller(store_url: str, keys: Path) -> None:
    async def scenario(running: FakeFleet) -> None:
        gate = Gate()
        await running.add_workers(("latent_preparation", "denoising", "decoding"))
        await running.add_worker("text_encoding", Script(running.scripts["text_encoding"].contract, gate), capacity=4)
        _, stub = await running.add_coordinator(api_keys=keys, max_open_of_caller=2)
        first = (await stub.Submit(submission(), metadata=bearer(ALICE))).request.request_id
        code, message = await code_and_message(stub.Submit(submission(), metadata=bearer(ALICE)))
        assert (code, message) == ("RESOURCE_EXHAUSTED", "alice has 1 open requests, which is the limit")
        ids = [(await stub.Submit(submission(), metadata=bearer(BOB))).request.request_id for _ in range(2)]
        assert (await code_and_message(stub.Submit(submission(), metadata=bearer(BOB))))[0] == "RESOURCE_EXHAUSTED"
        gate.opened.set()
        _, without_keys = await running.add_coordinator()
        for request_id in (first, *ids):
            await terminal(without_keys, request_id)
        assert (await stub.Submit(submission(), metadata=bearer(ALICE))).request.request_id
        async with connect(store_url) as redis:
            assert not await redis.exists("fleet:open-by:bob@studio")

    run_on_fleet(store_url, scenario)


def test_large_metadata_and_calls_beyond_the_bound_are_refused(store_url: str) -> None:
    async def scenario(running: FakeFleet) -> None:
        coordinator, stub = await running.add_coordinator(max_calls=2)
        large = (("x", "y" * 20_000),)
        assert (await code_and_message(stub.ListModels(pb.ListModelsRequest(), metadata=large)))[
            0
        ] == "RESOURCE_EXHAUSTED"
        queued = (await stub.Submit(submission())).request.request_id
        watches = [stub.Watch(pb.WatchRequest(request_id=queued)) for _ in range(2)]
        for watch in watches:
            assert await watch.read()
        code, message = await code_and_message(stub.ListModels(pb.ListModelsRequest()))
        assert (code, "2 concurrent calls" in message) == ("RESOURCE_EXHAUSTED", True)
        watches[0].cancel()
        await wait_until(lambda: coordinator.calls_in_flight <= 1)
        assert await stub.ListModels(pb.ListModelsRequest())
        watches[1].cancel()

    run_on_fleet(store_url, scenario)


async def run_fleet(*arguments: str, key: str) -> tuple[int | None, bytes, bytes]:
    """Run `fleet ARGUMENTS`; returns its exit code, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", *arguments),
        env=os.environ | {"FLEET_API_KEY": key},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    return process.returncode, output, errors


def test_the_command_line_sends_the_key(store_url: str, keys: Path) -> None:
    async def scenario(running: FakeFleet) -> None:
        coordinator, _ = await running.add_coordinator(api_keys=keys)
        arguments = ("models", "--endpoint", coordinator.address)
        code, _, errors = await run_fleet(*arguments, key="")
        assert code == 2
        assert errors.count(b"\n") == 1
        assert b"FLEET_API_KEY" in errors
        code, output, _ = await run_fleet(*arguments, key=BOB)
        assert code == 0
        assert b"emoji" in output

    run_on_fleet(store_url, scenario)


def token_settings(keys: Path) -> dict[str, Any]:
    return {"jwt_keys": keys, "jwt_audience": AUDIENCE, "jwt_issuer": ISSUER}


def test_token_identifies_the_caller_and_may_lower_its_bound(store_url: str, keys: Path, tmp_path: Path) -> None:
    (tmp_path / "jwks.json").write_text(jwk_set(jwk("Ed", kid="one")))

    async def scenario(running: FakeFleet) -> None:
        settings = {"api_keys": keys, "max_open_of_caller": 2} | token_settings(tmp_path / "jwks.json")
        _, stub = await running.add_coordinator(**settings)

        async def num_accepted(name: str, **claims: Any) -> int:
            """Submit three requests; returns the number of accepted requests."""
            metadata = bearer(token("Ed", "EdDSA", sub=name, **claims))
            codes = [(await stub.Submit(submission(), metadata=metadata).code()).name for _ in range(3)]
            assert codes == sorted(codes)
            assert set(codes) <= {"OK", "RESOURCE_EXHAUSTED"}
            return codes.count("OK")

        assert await num_accepted("carol") == 2
        assert await num_accepted("dave", max_open=1) == 1
        assert await num_accepted("erin", max_open=9) == 2
        assert await num_accepted("frank", max_open=0) == 0
        assert await num_accepted("alice", max_open=9) == 1
        for invalid in (
            token("Ed2", "EdDSA"),
            token("Ed", "EdDSA", aud="another"),
            token("Ed", "EdDSA", sub="a b"),
            "a.b.c",
        ):
            code, message = await code_and_message(stub.ListModels(pb.ListModelsRequest(), metadata=bearer(invalid)))
            assert code == "UNAUTHENTICATED"
            assert invalid not in message
        as_token = await stub.ListRequests(pb.ListRequestsRequest(), metadata=bearer(token("Ed", "EdDSA", sub="alice")))
        as_key = await stub.ListRequests(pb.ListRequestsRequest(), metadata=bearer(ALICE))
        assert as_token == as_key
        assert len(as_key.requests) == 1

    run_on_fleet(store_url, scenario)


def write_files(files: dict[Path, bytes]) -> None:
    for path, content in files.items():
        path.write_bytes(content)


def test_keys_are_reloaded_and_invalid_files_are_ignored(store_url: str, keys: Path, tmp_path: Path) -> None:
    public = tmp_path / "public.pem"
    public.write_bytes(public_pem("Ed"))

    async def scenario(running: FakeFleet) -> None:
        settings = {"api_keys": keys, "reload_seconds": 0} | token_settings(public)
        _, stub = await running.add_coordinator(**settings)

        async def accepted(*credentials: str) -> list[bool]:
            calls = [stub.ListModels(pb.ListModelsRequest(), metadata=bearer(each)) for each in credentials]
            codes = [(await call.code()).name for call in calls]
            assert set(codes) <= {"OK", "UNAUTHENTICATED"}
            return [code == "OK" for code in codes]

        old, new = token("Ed", "EdDSA"), token("Ed2", "EdDSA")
        assert await accepted(ALICE, BOB, "other", old, new) == [True, True, False, True, False]
        other_keys = f'[callers.bob]\nkey_sha256 = ["{digest("other")}"]\n'.encode()
        write_files({keys: other_keys, public: public_pem("Ed2")})
        assert await accepted(ALICE, BOB, "other", old, new) == [False, False, True, False, True]
        write_files({keys: b"[callers", public: b""})
        assert await accepted(ALICE, "other", old, new) == [False, True, False, True]

    run_on_fleet(store_url, scenario)


def test_the_command_line_sends_a_token(store_url: str, tmp_path: Path) -> None:
    (tmp_path / "public.pem").write_bytes(public_pem("Ed"))

    async def scenario(running: FakeFleet) -> None:
        coordinator, _ = await running.add_coordinator(**token_settings(tmp_path / "public.pem"))
        arguments = ("models", "--endpoint", coordinator.address)
        code, output, _ = await run_fleet(*arguments, key=token("Ed", "EdDSA"))
        assert (code, b"emoji" in output) == (0, True)
        code, _, errors = await run_fleet(*arguments, key=token("Ed", "EdDSA", exp=1))
        assert (code, errors.count(b"\n")) == (2, 1)
        assert b"the token has expired" in errors

    run_on_fleet(store_url, scenario)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jwt_keys": Path("x"), "jwt_audience": "a"}, "jwt_keys is set without jwt_issuer"),
        ({"jwt_secret": Path("x")}, "jwt_secret is set without jwt_audience"),
        ({"jwt_issuer": "i"}, "jwt_issuer is set without jwt_keys or jwt_secret"),
        ({"jwt_caller_claim": ""}, "jwt_caller_claim is empty"),
        ({"jwt_leeway_seconds": 301.0}, "from 0 to 300"),
        ({"jwt_leeway_seconds": -1.0}, "from 0 to 300"),
    ],
)
def test_invalid_token_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        CoordinatorSettings(**settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("callers", "is not TOML"),
        ("", "tables \\[callers.NAME\\]"),
        ("x = 1\n[callers.a]", "tables \\[callers.NAME\\]"),
        ("callers = 3", "tables \\[callers.NAME\\]"),
        ("[callers]\na = 3", "is not a table of only key_sha256 and max_open"),
        ("[callers.'a b']\nkey_sha256 = []", "does not have a name of"),
        ("[callers.a]\nkey = 'x'", "is not a table of only"),
        ("[callers.a]\n", "needs key_sha256"),
        ("[callers.a]\nkey_sha256 = 'x'", "needs key_sha256"),
        ("[callers.a]\nkey_sha256 = ['x']", "64 lower-case hex digits"),
        (f"[callers.a]\nkey_sha256 = ['{digest('x')}']\nmax_open = true", "max_open"),
        (f"[callers.a]\nkey_sha256 = ['{digest('x')}']\n[callers.b]\nkey_sha256 = ['{digest('x')}']", "share a key"),
    ],
)
def test_invalid_keys_file_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=message) as caught:
        read_keys(path)
    assert "\n" not in caught.value.message
    with pytest.raises(InvalidInput, match="is not readable"):
        read_keys(tmp_path / "none.toml")


def test_only_whole_keys_match_and_no_key_is_logged(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    callers = admission(CoordinatorSettings(api_keys=keys))
    assert isinstance(callers, ByBearer)
    with caplog.at_level(logging.DEBUG):
        assert callers.find(ALICE) == callers.find("next") == Caller("alice", 1)
        assert callers.find(BOB) == Caller("bob@studio")
        for wrong in ("", ALICE[:-1], ALICE + " ", digest(ALICE), secrets.token_hex(16), "\udfff"):
            with pytest.raises(Unauthenticated) as caught:
                callers.find(wrong)
            assert not wrong or wrong not in caught.value.message
    assert ALICE not in json.dumps(caplog.messages)


def test_an_api_key_with_two_dots_is_no_token(tmp_path: Path) -> None:
    key = "studio.2026.deadbeef"
    (tmp_path / "keys.toml").write_text(f'[callers.studio]\nkey_sha256 = ["{digest(key)}"]\n')
    (tmp_path / "jwks.json").write_text(jwk_set(jwk("Ed", kid="one")))
    settings = token_settings(tmp_path / "jwks.json")
    callers = admission(CoordinatorSettings(api_keys=tmp_path / "keys.toml", **settings))
    assert isinstance(callers, ByBearer)
    assert callers.find(key) == Caller("studio")
    assert callers.find(token("Ed", "EdDSA", sub="carol")).name == "carol"
    with pytest.raises(Unauthenticated, match="is not a JSON Web Token"):
        callers.find(f"{key}0")
