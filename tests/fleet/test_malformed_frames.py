"""Calls with malformed frames are refused with the field's name, and malformed replies are errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from async_tests import run_bounded, wait_until
from common.artifacts import Latents
from common.codec import unpack
from common.errors import FleetError, InternalError, InvalidInput, ResourceExhausted, Unavailable
from common.rpc.client import RemoteRunner, open_channel
from common.rpc.fleet_server import FleetServer
from common.rpc.frames import chunk_frame
from common.rpc.framing import chunk_frames
from common.rpc.status import from_rpc_error
from common.tensors import TORCH
from fleet.v1 import artifacts_pb2 as pb
from fleet.v1 import denoising_pb2
from stage_server import METHOD, RecordedCall, Served, packets, served

PATH = "initial_latents.parts.image.latents"
SIZE = 400_000


def frames() -> list[bytes]:
    """Frames of a valid call: a header and one chunk."""
    given = packets(SIZE // 4)
    header = denoising_pb2.DenoiseInputs(
        initial_latents=given["initial_latents"].message,  # type: ignore[arg-type]
        sampling=given["sampling"].message,  # type: ignore[arg-type]
    )
    request = denoising_pb2.DenoiseRequest(header=header)
    return [request.SerializeToString(), *chunk_frames(given["initial_latents"].chunks)]


def header_with(change: Callable[[Any], object]) -> bytes:
    request = denoising_pb2.DenoiseRequest.FromString(frames()[0])
    change(request.header)
    return request.SerializeToString()


def latents_of(header: Any) -> Any:
    return header.initial_latents.parts["image"].latents


MALFORMED: dict[str, tuple[list[bytes], str, str]] = {
    "no frame": ([], "before its header", ""),
    "empty frame": ([b""], "neither header nor chunk", ""),
    "invalid protobuf": ([b"\xff\xff\xff"], "not a fleet.v1.DenoiseRequest", ""),
    "chunk first": (frames()[1:], "before the header", PATH),
    "two headers": ([frames()[0]] * 2, "second header", ""),
    "no chunk": (frames()[:1], "ended after 0 of 400000 bytes", PATH),
    "chunk twice": ([*frames(), frames()[1]], "chunk offset 0 is not 400000", PATH),
    "other path": ([frames()[0], chunk_frame("x.y", 0, b"z")], "does not describe", "x.y"),
    "chunk beyond the end": (
        [frames()[0], chunk_frame(PATH, 0, bytes(SIZE + 1))],
        "is not within the tensor's 400000 bytes",
        PATH,
    ),
    "chunk after a gap": ([frames()[0], chunk_frame(PATH, 1, b"z")], "chunk offset 1 is not 0", PATH),
    "flipped bit": ([frames()[0], frames()[1][:-1] + b"\x00"], "the payload's checksum", PATH),
    "oversized chunk": ([frames()[0], chunk_frame(PATH, 0, bytes((1 << 20) + 1))], "1 to 1048576 bytes work", PATH),
    "unknown frame": ([b"\x7a\x00"], "does not support", "DenoiseRequest"),
    "unknown slot": ([frames()[0][:1] + b"\x03" + b"\xf8\x01\x01"], "does not support", "header"),
    "shape and byte_size differ": (
        [header_with(lambda header: latents_of(header).shape.append(2)), frames()[1]],
        "byte_size 400000 is not 800000",
        PATH,
    ),
    "huge byte_size": (
        [header_with(lambda header: latents_of(header).MergeFrom(pb.Tensor(shape=[1 << 40], byte_size=1 << 58)))],
        "the size of shape",
        PATH,
    ),
    "no dtype": ([header_with(lambda header: latents_of(header).ClearField("dtype"))], "not a Dtype", PATH),
    "slot missing": ([header_with(lambda header: header.ClearField("sampling"))], "sampling is missing", "sampling"),
    "slot that no stage reads": (
        [header_with(lambda header: header.canvas.SetInParent())],
        "canvas: an artifact",
        "canvas",
    ),
    "field missing": (
        [header_with(lambda header: header.initial_latents.parts["image"].ClearField("latents"))],
        "latents is missing",
        PATH,
    ),
    "invalid UTF-8": (
        [header_with(lambda header: header.sampling.params["key"].SetInParent()).replace(b"key", b"k\xffy")],
        "not valid UTF-8",
        "header.sampling.params.key",
    ),
    "parameter without value": (
        [header_with(lambda header: header.sampling.params["key"].SetInParent()), frames()[1]],
        "has no value",
        "sampling.params.key",
    ),
}


def test_malformed_calls_are_refused_and_the_worker_continues() -> None:
    async def test() -> None:
        async with served() as stage:
            for name, (sent, message, field) in MALFORMED.items():
                error = await refusal(stage, *sent)
                assert isinstance(error, InvalidInput), (name, error)
                assert message in error.message, name
                assert error.field == field, name
            assert len(await stage.raw_call(*frames())) == 2
            outputs = await stage.runner()(packets(), stage.recorded.call())
            assert unpack("denoised_latents", Latents, outputs["denoised_latents"], TORCH)
            assert not stage.servicer.in_flight

    run_bounded(test)


def test_oversized_message_is_refused() -> None:
    async def test() -> None:
        async with served() as stage:
            assert isinstance(await refusal(stage, bytes(17 << 20)), ResourceExhausted | Unavailable)
            assert len(await stage.raw_call(*frames())) == 2

    run_bounded(test)


def test_every_truncated_header_is_refused() -> None:
    async def test() -> None:
        header = frames()[0]
        async with served() as stage:
            for size in range(len(header)):
                assert isinstance(await refusal(stage, header[:size]), InvalidInput)
            assert not stage.servicer.in_flight

    run_bounded(test)


def test_disconnect_before_the_end_of_a_tensor_ends_the_call() -> None:
    async def test() -> None:
        async with served() as stage:
            async with open_channel(stage.server.address) as channel:
                call: Any = channel.stream_stream(METHOD)()
                await call.write(frames()[0])
                await wait_until(lambda: stage.servicer.in_flight == 1)
            await wait_until(lambda: stage.servicer.in_flight == 0)
            assert len(await stage.raw_call(*frames())) == 2

    run_bounded(test)


async def refusal(stage: Served, *sent: bytes) -> FleetError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stage.raw_call(*sent)
    return from_rpc_error(caught.value)


class FakeWorker:
    """A worker that replies to every call with `replies`."""

    def __init__(self, *replies: bytes) -> None:
        self._replies = replies
        self.methods: dict[str, Any] = {"Denoise": grpc.stream_stream_rpc_method_handler(self._answer)}

    async def _answer(self, _: Any, context: Any) -> None:
        while await context.read() is not grpc.aio.EOF:
            pass
        for reply in self._replies:
            await context.write(reply)


def reply(**frame: Any) -> bytes:
    return denoising_pb2.DenoiseResponse(**frame).SerializeToString()


HEADER_REPLY = reply(header=denoising_pb2.DenoiseOutputs(denoised_latents=pb.Latents()))
LARGE = pb.LatentPart(latents=pb.Tensor(dtype=pb.DTYPE_UINT8, shape=[70_000], byte_size=70_000))
LATENTS = pb.Latents(parts={"image": LARGE})


@pytest.mark.parametrize(
    ("replies", "kind", "message"),
    [
        ([], Unavailable, "ended without its result"),
        ([reply(progress=pb.Progress(step=1))], Unavailable, "ended without its result"),
        ([b"\xff"], InternalError, "invalid frames"),
        ([b""], InternalError, "unexpected frame"),
        ([b"\x7a\x00"], InternalError, "unexpected frame"),
        ([HEADER_REPLY, HEADER_REPLY], InternalError, "unexpected frame: header"),
        ([chunk_frame("denoised_latents.x", 0, b"z")], InternalError, "before its header"),
        ([HEADER_REPLY, chunk_frame("denoised_latents.x", 0, b"z")], InternalError, "does not describe"),
        ([reply(header=denoising_pb2.DenoiseOutputs())], InternalError, "outputs"),
        ([reply(header=denoising_pb2.DenoiseOutputs(denoised_latents=LATENTS))], InternalError, "ended after 0 of"),
        (
            [reply(checkpoint=pb.Checkpoint(state=pb.DenoiseState(latents=LATENTS))), HEADER_REPLY],
            Unavailable,
            "result",
        ),
        ([reply(checkpoint=pb.Checkpoint(state=pb.DenoiseState(latents=LATENTS)))] * 2, InternalError, "complete"),
    ],
)
def test_malformed_and_incomplete_replies_are_errors(
    replies: list[bytes], kind: type[FleetError], message: str
) -> None:
    async def test() -> None:
        server = FleetServer("127.0.0.1:0")
        server.add(FakeWorker(*replies).methods, "fleet.v1.DenoisingService")
        async with served() as stage, open_channel(await server.start()) as channel:
            with pytest.raises(kind, match=message):
                await RemoteRunner(channel, "denoising", stage.hosted.contract)(packets(8), RecordedCall().call())
        await server.drain(0)

    run_bounded(test)
