"""Seeds of stage calls and replies: frames with every slot, and stream items."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from fuzz_inputs import Frames
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from common.rpc.frames import chunk_frame
from common.rpc.framing import checksum
from fleet.v1 import artifacts_pb2 as pb


def framed_seeds(kind: type[Message]) -> list[Frames]:
    """Seeds: a call with every slot, a call with chunked tensors, and an empty call."""
    inline, chunked = cast(Any, kind)(), cast(Any, kind)()
    chunks: list[bytes] = []
    items: list[bytes] = []
    for slot in inline.header.DESCRIPTOR.fields:
        if slot.is_repeated:
            items += _sample_items(kind, slot)
            continue
        near, far = getattr(inline.header, slot.name), getattr(chunked.header, slot.name)
        near.SetInParent()
        far.SetInParent()
        chunks += _fill_tensors(slot.name, near, far)
    return [
        (inline.SerializeToString(), *items),
        (chunked.SerializeToString(), *chunks, *items),
        (kind().SerializeToString(),),
    ]


def _fill_tensors(slot: str, near: Any, far: Any) -> list[bytes]:
    """Add an inline tensor to one artifact and a chunked tensor to another; returns the chunks."""
    chunks: list[bytes] = []
    data = bytes(range(120))
    for (path, tensor), (_, described) in zip(_sample_tensors(slot, near), _sample_tensors(slot, far), strict=True):
        tensor.CopyFrom(pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[5, 6], byte_size=120, data=data))
        described.CopyFrom(pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[30], byte_size=120, checksum=checksum((data,))))
        chunks += [chunk_frame(path, 0, data[:50]), chunk_frame(path, 50, data[50:])]
    return chunks


def _sample_items(kind: type[Message], slot: FieldDescriptor) -> list[bytes]:
    """Two stream items: one with inline tensors, and one with chunked tensors."""
    assert slot.message_type is not None, "a stream consists of artifacts"
    near, far = cast(Any, kind)(), cast(Any, kind)()
    artifacts = []
    for index, frame in enumerate((near, far)):
        frame.item.slot, frame.item.index = slot.name, index
        (field,) = (
            each.name
            for each in pb.StreamItem.DESCRIPTOR.oneofs_by_name["artifact"].fields
            if each.message_type == slot.message_type
        )
        artifacts.append(getattr(frame.item, field))
        artifacts[-1].SetInParent()
    chunks = _fill_tensors(slot.name, *artifacts)
    return [near.SerializeToString(), far.SerializeToString(), *chunks]


def _sample_tensors(slot: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Add a tensor to each tensor field of an artifact; yields its path and the tensor."""
    match value:
        case pb.Latents():
            value.parts["image"].raw_latent_shape.append(30)
            yield f"{slot}.parts.image.latents", value.parts["image"].latents
        case pb.DenoiseState():
            value.latents.parts["image"].raw_latent_shape.append(30)
            yield f"{slot}.latents.parts.image.latents", value.latents.parts["image"].latents
        case pb.Conditioning():
            yield f"{slot}.prompt_embeds.x", value.prompt_embeds["x"]
        case pb.Schedule():
            yield f"{slot}.timesteps", value.timesteps
            yield f"{slot}.sigmas", value.sigmas
        case pb.ImageInputs():
            yield f"{slot}.images.image", value.images["image"]
        case pb.Generator():
            yield f"{slot}.state", value.state
        case pb.MediaItem():
            yield f"{slot}.data", value.data
