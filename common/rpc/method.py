"""Finds a stage service's RPC by convention, and reads the widest contract that its messages can carry.

The service "denoising" lives in fleet.v1.denoising_pb2, which defines one service with one method, whose frames are
`oneof frame { header = 1; chunk = 2; progress = 3; warning = 4; checkpoint = 5; begun = 6; item = 7 }`. A repeated
field of a header is a stream, whose items come in frames of their own. Nothing is registered anywhere.
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
"""Metadata key of a call whose caller knows Begun frames; its value is "1". Callers of before refuse unknown frames."""
ITEMS_KEY = "fleet-items"
"""Metadata key of a call whose caller reads items; its value is "1". Others get no streams but step checkpoints."""
COMPUTED_KEY = "fleet-compute-seconds"
"""Key of the trailing metadata of a call: the seconds that its stages took on the device thread."""
VARIANT_KEY = "fleet-variant"
"""Metadata key of a call for one variant of the worker's model; without it the call is for the first variant."""
TOKENS_KEY = "fleet-tokens"
"""Metadata key of a call: tokens that one step of it computes, for metrics alone; older callers send none."""
_NAME = re.compile(r"[a-z][a-z_]*")


def stage_method(service: str) -> MethodDescriptor:
    """The RPC of a stage service. Raises FailedPrecondition when there is no such service."""
    try:
        if not _NAME.fullmatch(service):
            raise ModuleNotFoundError(service)
        module = importlib.import_module(f"fleet.v1.{service}_pb2")
    except ModuleNotFoundError:
        raise FailedPrecondition(f"there is no stage service {service!r}", field="service") from None
    services: list[ServiceDescriptor] = list(module.DESCRIPTOR.services_by_name.values())
    methods = [method for each in services for method in each.methods]
    if len(methods) != 1 or not _framed(methods[0]):
        raise FailedPrecondition(f"{service!r} is not a stage service", field="service")
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
    """The method's path on the wire."""
    return f"/{service_name(method)}/{method.name}"


def service_name(method: MethodDescriptor) -> str:
    """Full name of the method's service, as health checks and reflection know it."""
    return str(method.containing_service.full_name)


def request_type(method: MethodDescriptor) -> type[Message]:
    """The class of a frame of the call."""
    return GetMessageClass(method.input_type)


def response_type(method: MethodDescriptor) -> type[Message]:
    """The class of a frame of the reply."""
    return GetMessageClass(method.output_type)


def begun_frame(reply: type[Message]) -> bytes | None:
    """The serialised frame which says that a call's stages start; None where the reply has no such frame."""
    if "begun" not in reply.DESCRIPTOR.fields_by_name:
        return None
    frame = cast(Any, reply())
    frame.begun.SetInParent()
    return cast(bytes, frame.SerializeToString())


def header_type(frame: type[Message]) -> type[Message]:
    """The class of a frame's header."""
    return GetMessageClass(cast(Descriptor, frame.DESCRIPTOR.fields_by_name["header"].message_type))


def contract_of(method: MethodDescriptor) -> Contract:
    """All slots that the RPC's messages can carry, every input optional: the union over families."""
    inputs, outputs = (
        {item.name: _artifact(cast(FieldDescriptor, item)) for item in header_type(frame).DESCRIPTOR.fields}
        for frame in (request_type(method), response_type(method))
    )
    return Contract(method.name, inputs, outputs, frozenset(inputs))


def _artifact(field: FieldDescriptor) -> str:
    if field.message_type is None:
        raise TypeError(f"{field.full_name} must be an artifact, or a stream of artifacts")
    return f"Stream[{field.message_type.name}]" if field.is_repeated else str(field.message_type.name)


def check_contract(contract: Contract, method: MethodDescriptor) -> None:
    """Raise PipelineError unless the contract is part of the RPC's messages, with equal types."""
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
