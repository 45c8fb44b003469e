"""The outcome of a request: its terminal state with the error or the files of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.errors import FleetError, InternalError, ResourceExhausted
from common.rpc.framing import Packet
from common.rpc.status import MAX_FIELD, to_status
from common.state.records import ResultFile, State, StateValue
from fleet.v1 import artifacts_pb2, generation_pb2


@dataclass(frozen=True)
class Outcome:
    """Terminal state of a request. `steps_saved` is the number of denoising steps that an early end has skipped."""

    state: StateValue
    error: generation_pb2.Error | None = None
    files: Sequence[ResultFile] = field(default=(), repr=False)
    steps_saved: int = 0


def success(slot: str, media: Packet, *, max_bytes: int | None = None) -> Outcome:
    """SUCCEEDED with the files of the Media packet in `slot`; FAILED if they exceed `max_bytes` in total."""
    try:
        files = result_files(slot, media)
    except InternalError as error:
        return failure(error)
    size = sum(file.header.byte_size for file in files)
    if max_bytes is not None and size > max_bytes:
        message = f"the raw result has {size} bytes; at most {max_bytes} are allowed"
        return failure(ResourceExhausted(message, field="output_format"))
    return Outcome(State.REQUEST_STATE_SUCCEEDED, files=files)


def failure(error: FleetError) -> Outcome:
    """FAILED with an error, whose message is truncated to a maximum size."""
    status = to_status(error)
    return Outcome(
        State.REQUEST_STATE_FAILED,
        generation_pb2.Error(code=status.code.name, message=status.details, field=error.field[:MAX_FIELD]),
    )


def result_files(slot: str, packet: Packet) -> list[ResultFile]:
    """The files of the Media packet in `slot`. Raises InternalError for a packet with another artifact."""
    media = packet.message
    if not isinstance(media, artifacts_pb2.Media):
        raise InternalError(f"the result is a {media.DESCRIPTOR.name}, not Media")
    return [
        ResultFile(
            generation_pb2.FileHeader(
                index=index,
                count=len(media.items),
                content_type=item.content_type,
                byte_size=item.data.byte_size,
                height=item.height,
                width=item.width,
                num_frames=item.num_frames,
            ),
            list(packet.payload(f"{slot}.items.{index}.data", item.data)),
        )
        for index, item in enumerate(media.items)
    ]
