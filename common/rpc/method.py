"""Finds the RPC of a stage service by naming convention, and derives a contract from its messages.

The service "denoising" is defined in fleet.v1.denoising_pb2, which has one service with one method. Its frames are
`oneof frame { header = 1; chunk = 2; progress = 3; warning = 4; checkpoint = 5; begun = 6; item = 7 }`. A repeated
field of a header is a stream, whose items are sent in StreamItem frames. There is no registry of services.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from common.errors import FailedPrecondition
from common.pipeline import PipelineError
from common.stage import STEP_CHECKPOINTS, Contract

_FRAMES = {
    "header": (1, ""),
    "chunk": (2, "Chunk"),
    "progress": (3, "Progress"),
    "warning": (4, "Warning"),
    STEP_CHECKPOINTS: (5, "Checkpoint"),
    "begun": (6, "Begun"),
    "item": (7, "StreamItem"),
}
BEGUN_KEY = "fleet-begun"
"""Metadata key of a call: "1" if the caller accepts Begun frames. Older callers refuse unknown frames."""
ITEMS_KEY = "fleet-items"
"""Metadata key of a call: "1" if the caller accepts StreamItem frames. Other callers get only step checkpoints."""
COMPUTED_KEY = "fleet-compute-seconds"
"""Trailing metadata key of a call: compute seconds of its stages on the device thread."""
VARIANT_KEY = "fleet-variant"
"""Metadata key of a call: variant of the worker's model. Default: the first variant."""
TOKENS_KEY = "fleet-tokens"
"""Metadata key of a call: relative size of one step (StageWork.tokens), for metrics only. Older callers omit it."""
_NAME = re.compile(r"[a-z][a-z_]*")


def stage_method(service: str) -> MethodDescriptor:
    """Return the RPC of a stage service. Raises FailedPrecondition if the service does not exist."""
    try:
        if not _NAME.fullmatch(service):
            raise ModuleNotFoundError(service)
        module = importlib.import_module(f"fleet.v1.{service}_pb2")
    except ModuleNotFoundError:
        raise FailedPrecondition(
            f"service: {service!r} is not the name of a stage service; denoising works", field="service"
        ) from None
    services: list[ServiceDescriptor] = list(module.DESCRIPTOR.services_by_name.values())
    methods = [method for each in services for method in each.methods]
    if len(methods) != 1 or not _framed(methods[0]):
        raise FailedPrecondition(f"service: {service!r} is not a stage service; denoising works", field="service")
    return methods[0]


def _framed(method: MethodDescriptor) -> bool:
    return all(
        item.name in _FRAMES
        and item.number == _FRAMES[item.name][0]
        and item.message_type is not None
        and _FRAMES[item.name][1] in ("", item.message_type.name)
        for message in (method.input_type, method.output_type)
        for item in message.fields
    )


def path_of(method: MethodDescriptor) -> str:
    """Return the method's HTTP/2 path."""
    return f"/{service_name(method)}/{method.name}"


def service_name(method: MethodDescriptor) -> str:
    """Return the full name of the method's service."""
    return str(method.containing_service.full_name)


def request_type(method: MethodDescriptor) -> type[Message]:
    """Return the message class of request frames."""
    return GetMessageClass(method.input_type)


def response_type(method: MethodDescriptor) -> type[Message]:
    """Return the message class of response frames."""
    return GetMessageClass(method.output_type)


def begun_frame(reply: type[Message]) -> bytes | None:
    """Return the serialized Begun frame; None if the response type has no such frame."""
    if "begun" not in reply.DESCRIPTOR.fields_by_name:
        return None
    frame = cast(Any, reply())
    frame.begun.SetInParent()
    return cast(bytes, frame.SerializeToString())


def header_type(frame: type[Message]) -> type[Message]:
    """Return the message class of a frame's header."""
    return GetMessageClass(cast(Descriptor, frame.DESCRIPTOR.fields_by_name["header"].message_type))


def contract_of(method: MethodDescriptor) -> Contract:
    """Return the contract with all slots of the RPC's messages, every input optional."""
    inputs, outputs = (
        {item.name: _artifact(cast(FieldDescriptor, item)) for item in header_type(frame).DESCRIPTOR.fields}
        for frame in (request_type(method), response_type(method))
    )
    return Contract(method.name, inputs, outputs, frozenset(inputs))


def _artifact(field: FieldDescriptor) -> str:
    if field.message_type is None:
        raise TypeError(f"{field.full_name} is not an artifact or a stream of artifacts")
    return f"Stream[{field.message_type.name}]" if field.is_repeated else str(field.message_type.name)


def check_contract(contract: Contract, method: MethodDescriptor) -> None:
    """Raise PipelineError unless the RPC's messages have all slots of the contract, with equal types."""
    carried = contract_of(method)
    problems = [
        f"{direction} {slot!r} as {kind}, but {method.name} carries {known.get(slot, 'nothing')} there"
        for direction, slots, known in (
            ("reads", contract.inputs, carried.inputs),
            ("writes", contract.outputs, carried.outputs),
        )
        for slot, kind in slots.items()
        if known.get(slot) != kind
    ]
    if problems:
        raise PipelineError(f"{contract.name} " + "; ".join(problems))
