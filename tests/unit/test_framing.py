"""Frames equal protobuf's serialization; inconsistent headers and chunks are refused."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.artifacts import Conditioning, LatentPart, Latents, StepCheckpoint
from common.codec import pack, unpack
from common.errors import InvalidInput, ResourceExhausted
from common.rpc.buffers import BufferPool
from common.rpc.frames import CHUNK_BYTES, ChunkView, chunk_frame, read_chunk
from common.rpc.framing import (
    Assembler,
    CallLimits,
    KeptFrames,
    Packet,
    PooledPayload,
    checksum,
    chunk_frames,
    described_tensors,
    split_packets,
)
from common.tensors import TORCH
from fleet.v1 import artifacts_pb2 as pb
from fleet.v1 import decoding_pb2, denoising_pb2, latent_preparation_pb2, text_encoding_pb2

SIZE = 3 * CHUNK_BYTES // 2
PATH = "text_conditioning.prompt_embeds.x"
FRAMES = (
    text_encoding_pb2.EncodeTextResponse,
    latent_preparation_pb2.PrepareLatentsRequest,
    denoising_pb2.DenoiseRequest,
    denoising_pb2.DenoiseResponse,
    decoding_pb2.DecodeRequest,
)


@given(
    path=st.text(max_size=300).filter(str.isprintable),
    offset=st.integers(0, 2**64 - 1),
    data=st.binary(max_size=300),
    kind=st.sampled_from(FRAMES),
)
def test_chunk_frames_equal_protobuf_serialization(path: str, offset: int, data: bytes, kind: Any) -> None:
    raw = chunk_frame(path, offset, memoryview(data))
    chunk = kind.FromString(raw).chunk
    assert (chunk.path, chunk.offset, chunk.data) == (path, offset, data)
    if path and data:
        assert kind(chunk=chunk).SerializeToString() == raw
        view = read_chunk(raw)
        assert view is not None
        assert (view.path, view.offset, bytes(view.data), view.frame) == (path, offset, data, raw)


@settings(max_examples=300)
@given(raw=st.binary(max_size=60), tail=st.binary(max_size=8), cut=st.integers(0, 40))
def test_read_chunk_agrees_with_protobuf(raw: bytes, tail: bytes, cut: int) -> None:
    for mangled in (raw, b"\x12" + raw, chunk_frame("a.b", 5, raw)[:cut] + tail):
        view = read_chunk(mangled)
        if view is not None:
            chunk = denoising_pb2.DenoiseRequest.FromString(mangled).chunk
            assert (chunk.path, chunk.offset, chunk.data) == (view.path, view.offset, bytes(view.data))


def test_read_chunk_returns_none_for_other_layouts() -> None:
    reordered = b"\x12\x08" + b"\x1a\x01z" + b"\x10\x05" + b"\x0a\x01p"
    assert denoising_pb2.DenoiseRequest.FromString(reordered).chunk.path == "p"
    assert read_chunk(reordered) is None
    assert read_chunk(denoising_pb2.DenoiseRequest().SerializeToString()) is None
    assert read_chunk(b"\x12\x07\x0a\x02\xff\xfe\x1a\x01z") is None


def conditioning_packet() -> tuple[torch.Tensor, Packet]:
    tensor = torch.randint(0, 255, (SIZE,), dtype=torch.uint8)
    return tensor, pack("text_conditioning", Conditioning(prompt_embeds={"x": tensor}), TORCH)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_packet_round_trips_through_its_frames(pooled: bool) -> None:
    tensor, packet = conditioning_packet()
    frames = list(chunk_frames(packet.chunks))
    assert len(frames) == 2
    lease = BufferPool().lease()
    store: Any = partial(PooledPayload, lease=lease) if pooled else KeptFrames
    header = denoising_pb2.DenoiseInputs(text_conditioning=packet.message)  # type: ignore[arg-type]
    assembler = Assembler(described_tensors("", header, CallLimits()), store)
    for frame in frames:
        assert not assembler.complete
        chunk = read_chunk(frame)
        assert chunk is not None
        assembler.add(chunk)
    assert assembler.complete
    received = split_packets(header, assembler.finish())["text_conditioning"]
    assert received.byte_size == packet.byte_size
    assert b"".join(received.payload(PATH, pb.Tensor())) == tensor.numpy().tobytes()
    assert torch.equal(unpack("text_conditioning", Conditioning, received, TORCH).prompt_embeds["x"], tensor)
    again = list(chunk_frames(received.chunks))
    assert again == frames
    assert pooled or all(map(lambda new, old: new is old, again, frames))
    lease.close()


def test_a_renamed_packet_uses_its_new_path() -> None:
    state = StepCheckpoint(
        step=2, latents=Latents(parts={"image": LatentPart(latents=torch.rand(1 << 16), raw_latent_shape=(1 << 16,))})
    )
    packet = pack("checkpoint", state, TORCH).renamed("checkpoint", "resume_from")
    (frame,) = chunk_frames(packet.chunks)
    chunk = read_chunk(frame)
    assert chunk is not None
    assert chunk.path == "resume_from.latents.parts.image.latents"
    found = unpack("resume_from", StepCheckpoint, packet, TORCH)
    assert torch.equal(found.latents.parts["image"].latents, state.latents.parts["image"].latents)


def tensor(**fields: Any) -> pb.Tensor:
    described: dict[str, Any] = {"dtype": pb.DTYPE_UINT8, "shape": [SIZE], "byte_size": SIZE} | fields
    return pb.Tensor(**described)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (tensor(dtype=pb.DTYPE_UNSPECIFIED), "not a Dtype"),
        (tensor(dtype=99), "not a Dtype"),
        (tensor(shape=[-1, -SIZE]), "at most 8 extents of at least 0 work"),
        (tensor(shape=[1] * 9), "at most 8 extents"),
        (tensor(byte_size=SIZE - 1), f"byte_size {SIZE - 1} is not {SIZE}"),
        (tensor(dtype=pb.DTYPE_FLOAT32), f"is not {4 * SIZE}, the size of"),
        (tensor(shape=[2**62, 2**62]), "the size of"),
        (tensor(data=b"abc"), "3 bytes of inline data are not"),
        (tensor(data=bytes(SIZE)), "chunks work"),
        (tensor(shape=[0], byte_size=0), "is not inline"),
    ],
)
def test_an_inconsistent_tensor_description_is_refused(wrong: pb.Tensor, message: str) -> None:
    header = denoising_pb2.DenoiseInputs(text_conditioning=pb.Conditioning(prompt_embeds={"x": wrong}))
    with pytest.raises(InvalidInput, match=message) as caught:
        described_tensors("", header, CallLimits())
    assert caught.value.field == PATH


def test_limits_of_a_call_are_enforced() -> None:
    header = pb.Conditioning(prompt_embeds={"x": tensor(), "y": tensor()})
    with pytest.raises(ResourceExhausted, match=r"c\.prompt_embeds\.y: a total of"):
        described_tensors("c", header, CallLimits(total_bytes=SIZE))
    with pytest.raises(InvalidInput, match="2 tensors are not at most 1"):
        described_tensors("c", header, CallLimits(tensors=1))
    with pytest.raises(InvalidInput, match="characters is not at most 512"):
        described_tensors("c", pb.Conditioning(prompt_embeds={"x" * 600: tensor()}), CallLimits())


def view(offset: int, size: int, path: str = PATH) -> ChunkView:
    return ChunkView(path, offset, bytes(size))


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([view(0, 9, "elsewhere")], "does not describe"),
        ([view(5, 9)], "chunk offset 5 is not 0"),
        ([view(0, 9), view(0, 9)], "chunk offset 0 is not 9"),
        ([view(0, 9), view(10, 9)], "chunk offset 10 is not 9"),
        ([view(0, 0)], "a chunk of 0 bytes is not valid"),
        ([view(0, CHUNK_BYTES + 1)], "1 to 1048576 bytes work"),
        ([view(0, CHUNK_BYTES), view(CHUNK_BYTES, CHUNK_BYTES)], "is not within the tensor's"),
        ([view(0, CHUNK_BYTES)], "ended after 1048576 of"),
        ([], "ended after 0 of"),
        ([view(0, CHUNK_BYTES), view(CHUNK_BYTES, SIZE - CHUNK_BYTES)], "the payload's checksum"),
    ],
)
def test_chunks_that_do_not_match_the_payload_are_refused(chunks: list[ChunkView], message: str) -> None:
    assembler = Assembler({PATH: tensor(checksum=checksum((b"other",)))}, KeptFrames)
    with pytest.raises(InvalidInput, match=message):  # noqa: PT012 -- the step that raises differs
        for chunk in chunks:
            assembler.add(chunk)
        assembler.finish()


def test_unreferenced_buffers_are_reused() -> None:
    pool = BufferPool(max_idle_bytes=8 << 20)
    lease = pool.lease()
    buffer, window = lease.take(SIZE)
    first = id(buffer)
    del buffer
    lease.close()
    lease.close()
    assert pool.idle_bytes == 2 << 20
    with pytest.raises(ValueError, match="released"):
        window[0]
    again = pool.lease()
    buffer, _ = again.take(SIZE)
    assert id(buffer) == first
    alias = torch.frombuffer(buffer, dtype=torch.uint8)
    del buffer
    again.close()
    assert pool.idle_bytes == 0  # The tensor still refers to the buffer.
    alias.fill_(3)
    gc.collect()


@pytest.mark.parametrize(("wanted", "reused"), [(4 << 20, True), ((2 << 20) + 1, True), (1 << 20, False)])
def test_large_buffers_are_not_reused_for_small_sizes(wanted: int, reused: bool) -> None:
    pool = BufferPool()
    lease = pool.lease()
    lease.take(4 << 20)
    lease.close()
    pool.lease().take(wanted)
    assert (pool.idle_bytes == 0) == reused


def test_idle_memory_is_bounded() -> None:
    pool = BufferPool(max_idle_bytes=4 << 20)
    lease = pool.lease()
    for _ in range(5):
        lease.take(1 << 20)
    lease.close()
    assert pool.idle_bytes == 4 << 20
