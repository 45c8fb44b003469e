"""Fuzz targets: all code that parses untrusted bytes; each must return or raise a FleetError."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import grpc
import torch
from fuzz_context import Answer, Context
from fuzz_frames import framed_seeds
from fuzz_inputs import Frames
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from PIL import Image, ImageCms, PngImagePlugin
from redis.exceptions import ConnectionError as RedisConnectionError

from bare_checkpoint import build_bare_flux, safetensors_bytes
from common.checkpoint import Checkpoint
from common.codec import pack
from common.errors import FleetError, InternalError, Unauthenticated, Unavailable
from common.image_header import MAX_PIXELS
from common.rpc.client import RemoteRunner
from common.rpc.frames import chunk_frame, read_chunk
from common.rpc.framing import CallLimits
from common.rpc.method import contract_of, request_type, response_type, stage_method
from common.rpc.parsing import parse, refuse_unknown_fields
from common.rpc.replies import ReplyCache
from common.rpc.stage_servicer import ServicerLimits, StageServicer
from common.rpc.status import from_status, to_status
from common.rpc.tls import read_authority
from common.safetensors_header import read_header
from common.settings import load_settings
from common.stage import Call, Contract
from common.state.requests import Admission, RequestStore
from common.tensors import TORCH
from fleet.v1 import artifacts_pb2 as pb
from fleet.v1 import generation_pb2
from models.catalog import ServedModel, open_model
from models.images import open_image
from models.registry import load_registry
from models.validation import InputValidationStage
from services.coordinator.callers import read_keys
from services.coordinator.driver import Driver
from services.coordinator.handlers import ServiceHandler
from services.coordinator.request_life import Submission
from services.coordinator.service import GenerationService, OfferedModel
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.tokens import Claimed, TokenRules, TokenVerifier, VerificationKey, read_public_keys
from services.denoising.messages import OutOfStep
from services.worker_settings import WorkerSettings
from tokens import AUDIENCE, ISSUER, jwk, jwk_set, private_key, public_pem, token

SERVICES = ("text_encoding", "image_encoding", "latent_preparation", "before_denoising", "denoising", "decoding")
PUBLIC = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
LIMITS = CallLimits(total_bytes=64 << 20)


@dataclass(frozen=True)
class Target:
    """A fuzz target. `run` takes an input; `seeds` are valid inputs, `types` are message types of frames.

    `most_bytes` is the largest memory growth of the process per input.
    """

    name: str
    run: Callable[[Frames], None]
    seeds: Sequence[Frames]
    types: Sequence[Descriptor] = ()
    most_bytes: int = 192 << 20


def check(target: Target, frames: Frames) -> None:
    """Run a target. A FleetError is accepted if it can be sent to a caller; any other error is a finding.

    Between ranks, OutOfStep is accepted, too, as the group restarts.
    """
    try:
        target.run(frames)
    except OutOfStep:
        return
    except FleetError as error:
        status = to_status(error)
        status.details.encode()
        assert all(value.isascii() for _, value in status.metadata)


@contextlib.contextmanager
def targets(directory: Path) -> Iterator[list[Target]]:
    """Yield all targets without a server, valid in the block; `directory` is for files of some targets."""
    torch.set_num_threads(1)
    model = open_model("emoji", load_registry())
    loop = asyncio.new_event_loop()
    with contextlib.closing(loop), ThreadPoolExecutor(1) as device:
        yield [
            *(_stage_target(service, loop, device) for service in SERVICES),
            *(_reply_target(service, loop) for service in SERVICES),
            *_public_targets(model, loop),
            *_parser_targets(),
            Target("chunk", _chunk, [(chunk_frame("a.b", 5, b"data"),), (chunk_frame("a", 0, b""),)]),
            Target("status", _status, [(b"InvalidInput", b"details", b"prompt"), (b"", b"", b"%ff%")]),
            Target("image", _image, list(_image_seeds()), most_bytes=4 * MAX_PIXELS * 4),
            *_file_targets(directory),
        ]
        loop.run_until_complete(loop.shutdown_asyncgens())


class Reader:
    """Stages that read every slot of their service's messages and write none."""

    def __init__(self, service: str) -> None:
        widest = contract_of(stage_method(service))
        self.contract = Contract(service, widest.inputs, {}, widest.optional)

    def contract_of(self, variant: str) -> Contract:
        assert not variant
        return self.contract

    def run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        """Read every byte of every tensor by packing the unpacked artifacts."""
        call.check_cancelled()
        for slot, value in values.items():
            for each in value if slot in self.contract.input_streams else [value]:
                assert pack(slot, each, TORCH).byte_size < 2 * LIMITS.total_bytes
        return {}


def stage_servicer(service: str, device: ThreadPoolExecutor) -> StageServicer:
    """A servicer for a stage's RPC, with stages that only read artifacts."""
    limits = ServicerLimits(capacity=1, call=LIMITS)
    cache = ReplyCache(1 << 20, service=service, model="fuzz") if service == "text_encoding" else None
    return StageServicer(service, Reader(service), device, TORCH, limits=limits, cache=cache)


def _stage_target(service: str, loop: asyncio.AbstractEventLoop, device: ThreadPoolExecutor) -> Target:
    """Target of a stage service's RPC, from frames to artifacts."""
    method = stage_method(service)
    servicer = stage_servicer(service, device)
    handler: Any = servicer.methods[method.name]

    def run(frames: Frames) -> None:
        try:
            loop.run_until_complete(handler.stream_stream(None, Context(frames)))
        except InternalError as error:
            raise AssertionError(f"invalid input raised an internal error: {error}") from error
        finally:
            assert not servicer.in_flight
            assert servicer.pool.idle_bytes <= 256 << 20

    kind = request_type(method)
    return Target(f"rpc.{service}", run, framed_seeds(kind), [frame_type(kind)])


def _reply_target(service: str, loop: asyncio.AbstractEventLoop) -> Target:
    """Target of a coordinator's parsing of worker replies."""
    method = stage_method(service)
    kind = response_type(method)
    outputs = contract_of(method).outputs
    runner = RemoteRunner(cast(Any, _Channel()), service, Contract(service, {}, outputs), limits=LIMITS)

    def run(frames: Frames) -> None:
        _Channel.frames = frames
        loop.run_until_complete(runner({}, Call("fuzz")))

    return Target(f"reply.{service}", run, framed_seeds(kind), [frame_type(kind)])


class _Channel:
    """A channel to a fake worker that replies to every call with `frames`."""

    frames: Frames = ()

    def stream_stream(self, *_: object) -> Any:
        return lambda *_, **__: Answer(self.frames)


def frame_type(frame: type[Message]) -> Descriptor:
    """Message type of a frame, which contains all other message types, directly or indirectly."""
    return cast(Descriptor, frame.DESCRIPTOR)


def _chunk(frames: Frames) -> None:
    for raw in frames:
        if (chunk := read_chunk(raw)) is not None:
            again = chunk_frame(chunk.path, chunk.offset, bytes(chunk.data))
            assert read_chunk(again) == (chunk.path, chunk.offset, chunk.data, again)


def _image_seeds() -> Iterator[Frames]:
    """Images of each format. Some have separately parsed data: EXIF, texts, color profiles, several frames."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    text = PngImagePlugin.PngInfo()
    text.add_text("key", "value" * 20, zip=True)
    text.add_itxt("Raw profile type exif", "exif\n 10\n45786966")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()[:400]
    for form in ("PNG", "JPEG", "WEBP"):
        yield (_encoded(form),)
        yield (_encoded(form, exif=exif, icc_profile=profile),)
    yield (_encoded("PNG", pnginfo=text),)
    yield (_encoded("JPEG", progressive=True, comment=b"x"),)
    yield (_encoded("WEBP", lossless=True),)
    yield (_encoded("MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))]),)


def _encoded(form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), (200, 30, 30)).save(file, form, **options)
    return file.getvalue()


def _image(frames: Frames) -> None:
    """Open an image. Pillow's warnings, such as for broken EXIF, are ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        open_image("image", b"".join(frames))


def _status(frames: Frames) -> None:
    kind, details, field = (*(frame.decode("utf-8", "surrogateescape") for frame in frames), "", "", "")[:3]
    for code in grpc.StatusCode:
        from_status(code, details, (("fleet-error", kind), ("fleet-error-field", field), ("x-bin", b"\xff")))


class _NoRedis:
    """A store that is unavailable."""

    async def execute_command(self, *_: Any) -> NoReturn:
        raise RedisConnectionError("unavailable")

    async def xread(self, *_: Any, **__: Any) -> NoReturn:
        raise RedisConnectionError("unavailable")

    async def zrevrangebyscore(self, *_: Any, **__: Any) -> NoReturn:
        raise RedisConnectionError("unavailable")

    def pipeline(self, **_: Any) -> NoReturn:
        raise RedisConnectionError("unavailable")


class _Registry:
    """A registry without workers."""

    async def load(self, *_: Any) -> NoReturn:
        raise Unavailable("no workers")


class _Activities:
    """Activities without a store."""

    async def list(self, *_: Any, **__: Any) -> NoReturn:
        raise Unavailable("no store")


class _Driver:
    """A driver that accepts a request up to the first store access."""

    def __init__(self, store: RequestStore) -> None:
        self._store = store

    async def accept(self, submission: Submission) -> tuple[Admission, None]:
        assert submission.record.model == "emoji"
        admission = await self._store.admit(
            submission.record, idempotency_key=submission.idempotency_key, limits=submission.limits
        )
        return admission, None

    def cancel(self, request_id: str) -> None:
        assert request_id

    def runs(self, request_id: str) -> bool:
        return not request_id


def public_service(model: ServedModel) -> ServiceHandler:
    """The public RPCs up to the first store access."""
    store = RequestStore(cast(Any, _NoRedis()))
    driver = cast(Driver, _Driver(store))
    offered = {"emoji": OfferedModel.of(model)}
    service = GenerationService(
        offered,
        store,
        cast(Any, _Registry()),
        cast(Any, None),
        driver,
        CoordinatorSettings(),
        health=cast(Any, None),
        activities=cast(Any, _Activities()),
    )
    return ServiceHandler(PUBLIC, service.functions)


def _public_targets(model: ServedModel, loop: asyncio.AbstractEventLoop) -> Iterator[Target]:
    handlers = public_service(model)
    for method in PUBLIC.methods:
        handler: Any = handlers.methods[method.name]
        yield Target(
            f"public.{method.name}",
            _public_run(handler, loop),
            [(each.SerializeToString(),) for each in PUBLIC_SEEDS[method.name]],
            [method.input_type],
        )


def _public_run(handler: Any, loop: asyncio.AbstractEventLoop) -> Callable[[Frames], None]:
    async def call(raw: bytes) -> None:
        if handler.unary_unary is not None:
            await handler.unary_unary(raw, None)
        else:
            async with contextlib.aclosing(handler.unary_stream(raw, None)) as replies:
                async for _ in replies:
                    continue

    def run(frames: Frames) -> None:
        for raw in frames:
            loop.run_until_complete(call(raw))

    return run


_SUBMIT = generation_pb2.SubmitRequest(
    model="emoji",
    parameters=generation_pb2.GenerationParameters(
        prompt="a red apple",
        height=64,
        width=72,
        seed=7,
        params={"max_sequence_length": pb.ParamValue(int_value=64), "prompt_2": pb.ParamValue(string_value="x")},
    ),
    idempotency_key="key",
    priority=3,
)
PUBLIC_SEEDS: Mapping[str, Sequence[Message]] = {
    "Submit": [_SUBMIT],
    "Generate": [generation_pb2.GenerateRequest(request=_SUBMIT)],
    "Watch": [generation_pb2.WatchRequest(request_id="0123456789abcdef", after_event_id="1-1")],
    "DownloadResult": [generation_pb2.DownloadResultRequest(request_id="0123456789abcdef", index=0)],
    "GetRequest": [generation_pb2.GetRequestRequest(request_id="0123456789abcdef")],
    "CancelRequest": [generation_pb2.CancelRequestRequest(request_id="0123456789abcdef")],
    "ListRequests": [generation_pb2.ListRequestsRequest(page_size=3, page_token="7", model="emoji")],
    "ListModels": [generation_pb2.ListModelsRequest()],
}


def _token(frames: Frames) -> None:
    """Verify a token from its parts; only the unchanged token may be accepted."""
    text = b".".join(frames).decode("latin-1")
    try:
        claimed = _VERIFIER.verify(text)
    except Unauthenticated:
        return
    assert claimed == Claimed("alice", None)


_VERIFIER = TokenVerifier(
    [VerificationKey(cast(Any, private_key("Ed").public_key()), "EdDSA", "k")],
    TokenRules(audience=AUDIENCE, issuer=ISSUER),
)


def _file_targets(directory: Path) -> Iterator[Target]:
    """Targets of operators' files: weights, configs, settings, keys."""
    file = directory / secrets.token_hex(4)

    def reading(read: Callable[[Path], object]) -> Callable[[Frames], None]:
        def run(frames: Frames) -> None:
            file.write_bytes(b"".join(frames))
            read(file)

        return run

    weights = safetensors_bytes({"a": [0.0] * 3, "b": [0.0]})
    yield Target("safetensors", reading(read_header), [(weights,)])
    keys = b'[callers.a]\nkey_sha256 = ["' + b"0" * 64 + b'"]\nmax_open = 3\n'
    yield Target("keys", reading(read_keys), [(keys,)])
    key_set = jwk_set(jwk("Ed", kid="k", use="sig"), jwk("P-256", alg="ES256"), {"kty": "RSA", "use": "enc"}).encode()
    yield Target("jwt_keys", reading(read_public_keys), [(key_set,), (public_pem("Ed"), public_pem("P-256"))])
    yield Target("token", _token, [tuple(token("Ed", "EdDSA", {"kid": "k"}).encode().split(b"."))])
    pem = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    yield Target("authority", reading(read_authority), [(pem,)])
    toml = b'model = ["emoji"]\nqueue_limit = 3\ngrace_seconds = 1.5\nlog_level = "INFO"\nplugins = ["x"]\n'
    yield Target("toml", reading(_from_toml), [(toml,)])
    flags = (b"--model", b"emoji", b"--capacity=3", b"--dtype", b"float32", b"--redis", b"redis://x", b"3")
    yield Target("flags", _flags, [flags])
    sharded = build_bare_flux(directory / "sharded")
    map_of_shards = b'{"weight_map": {"weight": "model.safetensors", "bias": "model.safetensors"}}'
    yield Target("shards", _shards_run(sharded), [(map_of_shards,)])
    checkpoint = build_bare_flux(directory / "checkpoint")
    index = (checkpoint / "model_index.json").read_bytes()
    seed = (index, b'{"height": 128, "sigmas": [1, 0.5]}', json.dumps({"block_out_channels": [8] * 4}).encode())
    yield Target("checkpoint", _checkpoint_run(checkpoint), [seed])


def _shards_run(path: Path) -> Callable[[Frames], None]:
    def run(frames: Frames) -> None:
        (path / "text_encoder" / "model.safetensors.index.json").write_bytes(b"".join(frames))
        Checkpoint.open(path)

    return run


def _from_toml(path: Path) -> None:
    load_settings(CoordinatorSettings, ["--config", str(path)], prog="fuzz", environ={})


def _flags(frames: Frames) -> None:
    """Parse flags and, from the last frame, an environment variable."""
    *words, capacity = (*(frame.decode("utf-8", "surrogateescape") for frame in frames), "")[: max(len(frames), 1)]
    if "--config" in words:
        return  # This would read a random path. The target "toml" fuzzes the contents of config files.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        load_settings(WorkerSettings, words, prog="fuzz", environ={"FLEET_CAPACITY": capacity})


def _checkpoint_run(path: Path) -> Callable[[Frames], None]:
    registry = load_registry()

    def run(frames: Frames) -> None:
        index, defaults, config = (*frames, b"{}", b"{}", b"{}")[:3]
        (path / "model_index.json").write_bytes(index)
        (path / "sampling_defaults.json").write_bytes(defaults)
        (path / "vae" / "config.json").write_bytes(config)
        InputValidationStage(open_model(str(path), registry)).run({"prompt": "x", "seed": 1})

    return run


def _parser_targets() -> Iterator[Target]:
    """Targets of the protobuf parser alone, for the request and response frames of every stage service."""
    kinds = [request_type(stage_method(service)) for service in SERVICES]
    kinds += [response_type(stage_method(service)) for service in SERVICES]
    for kind in kinds:
        yield Target(f"parse.{kind.DESCRIPTOR.name}", _parsing(kind), framed_seeds(kind), [frame_type(kind)])


def _parsing(kind: type[Message]) -> Callable[[Frames], None]:
    def run(frames: Frames) -> None:
        for raw in frames:
            refuse_unknown_fields("", parse(kind, raw))

    return run
