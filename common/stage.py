"""Stages: functions from one typed input to one typed output. A stage's contract is derived from the two types."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from common.artifacts import message_name
from common.errors import Cancelled, DeadlineExceeded

In = TypeVar("In")
Out = TypeVar("Out")
Item = TypeVar("Item", covariant=True)

RESUME: Mapping[str, bool] = MappingProxyType({"resume": True})
"""Dataclass metadata of the resume slot, the input field with the step checkpoint to resume from."""

STEP_CHECKPOINTS = "checkpoint"
"""Name of the implicit stream of step checkpoints, which every stage may emit. No slot may have this name."""

_OPTIONAL = re.compile(r"^(?P<kind>[\w\[\]]+) \| None$")
_STREAM = re.compile(r"^Stream\[(?P<item>\w+)\]$")


class Stream(Protocol[Item]):
    """A slot with an ordered sequence of artifacts. The reader runs concurrently with the writer.

    A stage declares it as `Stream[Latents]`. An input stream is iterated once; `next()` blocks until the next item
    arrives, or raises Cancelled or DeadlineExceeded. The items of an output stream are passed to Call.emit(), and
    the output field has the value EMITTED.
    """

    def __iter__(self) -> Iterator[Item]:
        """Yield the artifacts in order."""

    def has_next(self) -> bool:
        """Return whether an item is available without blocking."""


class _Emitted:
    """Placeholder for a stream in the outputs of a stage."""

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("the items of an output stream were passed to Call.emit()")

    def has_next(self) -> bool:
        raise TypeError("the items of an output stream were passed to Call.emit()")


EMITTED: Stream[Any] = _Emitted()
"""Value of the output field of a stream whose items were passed to Call.emit()."""


def item_kind(kind: str) -> str | None:
    """Return the message name of the items of a `kind` such as "Stream[Latents]"; None for other kinds."""
    match = _STREAM.match(kind)
    return match["item"] if match else None


class ItemSink(Protocol):
    """Receives the items of one stream from a runner."""

    async def put(self, index: int, item: Any, byte_size: int) -> None:
        """Store an item: an artifact or a packet, like the values of the runner.

        Waits while the reader is too slow. An index that is already stored is ignored.
        """


def _ignore(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Call:
    """Context of a call for its stages: request id, deadline, cancellation, and callbacks for progress.

    `deadline`: time.monotonic() timestamp in seconds.
    `on_begun`: called when the stages start.
    `on_item`: called with slot, index and artifact of each item that a stage emits. May block, so that a slow reader
    delays the stage. Runners replace it by a function that puts items into `sinks`, by slot; items without a sink are
    dropped.
    `waiting`: context in which the stage's thread waits for items and readers; other calls may use the device.
    `on_computed`: called with the compute seconds that a worker reports at the end of a call or of a hand-over.
    `hand_over`: set when a draining worker hands the call over. A stage that emits step checkpoints then ends at the
    next step boundary.
    `variant`: variant of the model whose stages run; empty for the first.
    `tokens`: work of one step, as in StageWork; 0 if the caller does not send it.
    """

    request_id: str
    on_progress: Callable[[int, int], None] = _ignore
    on_warning: Callable[[str, str], None] = _ignore
    on_item: Callable[[str, int, Any], None] = _ignore
    on_begun: Callable[[], None] = _ignore
    on_computed: Callable[[float], None] = _ignore
    cancelled: threading.Event = field(default_factory=threading.Event)
    hand_over: threading.Event = field(default_factory=threading.Event)
    deadline: float | None = None
    variant: str = ""
    tokens: int = 0
    sinks: Mapping[str, ItemSink] = field(default_factory=dict)
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    emitted: dict[str, int] = field(default_factory=dict)
    """Index of the next item, by stream."""

    def emit(self, slot: str, artifact: Any, index: int | None = None) -> None:
        """Send the next item of a stream to its reader. Blocks while the reader is too slow, until cancellation.

        `index` is the index of the item in the stream, from 0. Default: the next index. A stage that resumes passes the
        original index. The item's tensors must be on the CPU, and the stage must not modify them afterwards.
        """
        number = self.emitted.get(slot, 0) if index is None else index
        self.emitted[slot] = number + 1
        self.on_item(slot, number, artifact)

    def checkpoint(self, state: Any) -> None:
        """Emit a StepCheckpoint. It replaces an earlier step checkpoint that is not sent yet."""
        self.emit(STEP_CHECKPOINTS, state)

    def progress(self, step: int, total_steps: int) -> None:
        """Report a completed step. Raises the errors of check_cancelled(): a cancelled loop ends within one step."""
        self.check_cancelled()
        self.on_progress(step, total_steps)

    def check_cancelled(self) -> None:
        """Raise Cancelled if the call was cancelled, DeadlineExceeded if its deadline has passed."""
        if self.cancelled.is_set():
            raise Cancelled(f"request {self.request_id} was cancelled")
        if (left := self.seconds_left()) is not None and left <= 0:
            raise DeadlineExceeded(f"request {self.request_id} is past its deadline")

    def must_hand_over(self) -> bool:
        """Return whether the stage must emit a step checkpoint and raise HandedOver now. Equal on all ranks."""
        return self.hand_over.is_set()

    def seconds_left(self) -> float | None:
        """Return the seconds until the deadline, negative after it; None without a deadline."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def warn(self, field: str, message: str) -> None:
        """Send a warning about the parameter `field`: one sentence with the problem and its consequence."""
        self.on_warning(field, message)


@dataclass(frozen=True)
class Contract:
    """Slots that consecutive stages read and write, each with the message name of its artifact.

    `optional` inputs may be absent. `optional_outputs` are computed only if the pipeline reads them. `resume_slot` is
    the input with the step checkpoint to resume from; None if the stages always start at the beginning.
    """

    name: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    optional_outputs: frozenset[str] = frozenset()
    resume_slot: str | None = None

    @property
    def input_streams(self) -> frozenset[str]:
        """Input slots that are streams."""
        return frozenset(slot for slot, kind in self.inputs.items() if item_kind(kind))

    @property
    def output_streams(self) -> frozenset[str]:
        """Output slots that are streams."""
        return frozenset(slot for slot, kind in self.outputs.items() if item_kind(kind))

    def reading(self, *names: str) -> Contract:
        """Return the contract without optional inputs, except the resume slot and `names`.

        Raises ValueError for a name that is not an optional input.
        """
        if unknown := sorted(set(names) - self.optional):
            known = ", ".join(sorted(self.optional)) or "none"
            raise ValueError(f"{self.name}: {', '.join(unknown)} is not an optional input; optional inputs are {known}")
        kept = self.optional.intersection({*names, self.resume_slot})
        dropped = self.optional - kept
        inputs = {slot: kind for slot, kind in self.inputs.items() if slot not in dropped}
        return replace(self, inputs=inputs, optional=kept)

    def writing(self, names: Collection[str]) -> Contract:
        """Return the contract without optional outputs, except `names`, which become required."""
        dropped = self.optional_outputs.difference(names)
        outputs = {slot: kind for slot, kind in self.outputs.items() if slot not in dropped}
        return replace(self, outputs=outputs, optional_outputs=frozenset())

    def includes(self, part: Contract) -> bool:
        """Return whether `part` equals this contract, except that it may lack optional slots."""
        whole = self.reading(*(part.optional & self.optional)).writing(part.outputs)
        return (part.inputs, part.outputs) == (whole.inputs, whole.outputs)


def derive_contract(name: str, inputs: type[Any], outputs: type[Any]) -> Contract:
    """Derive a contract from two dataclasses whose fields are artifacts. Raises TypeError for other types.

    Annotations are parsed as strings, so that torch need not be imported to resolve them.
    """
    read, optional = _slots(inputs)
    written, optional_outputs = _slots(outputs)
    return Contract(name, read, written, optional, optional_outputs, _resume_slot(inputs, optional))


def _resume_slot(inputs: type[Any], optional: frozenset[str]) -> str | None:
    """Return the field with RESUME, or None. Raises TypeError for several such fields and for a required field."""
    marked = [item.name for item in dataclasses.fields(inputs) if item.metadata == RESUME]
    if len(marked) > 1 or not optional.issuperset(marked):
        raise TypeError(
            f"{inputs.__name__}: resume slot {', '.join(marked)} is not a single, optional field; "
            "a stage has at most one resume slot"
        )
    return marked[0] if marked else None


def _slots(cls: type[Any]) -> tuple[dict[str, str], frozenset[str]]:
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is not a dataclass of artifacts")
    slots: dict[str, str] = {}
    optional: set[str] = set()
    for item in dataclasses.fields(cls):
        kind = item.type if isinstance(item.type, str) else getattr(item.type, "__name__", str(item.type))
        if match := _OPTIONAL.match(kind):
            kind = match["kind"]
            optional.add(item.name)
        of_stream = item_kind(kind)
        if not (of_stream or kind).isidentifier():
            raise TypeError(f"{cls.__name__}.{item.name}: {kind!r} is not an artifact, optional artifact or stream")
        slots[item.name] = f"Stream[{message_name(of_stream)}]" if of_stream else message_name(kind)
    return slots, frozenset(optional)


def compose_contracts(name: str, contracts: Sequence[Contract]) -> Contract:
    """Return the contract of consecutive stages: inputs that no earlier stage writes, and all outputs."""
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}
    optional_outputs: set[str] = set()
    required: set[str] = set()
    for contract in contracts:
        for slot, kind in contract.inputs.items():
            if slot not in outputs:
                inputs[slot] = kind
                if slot not in contract.optional:
                    required.add(slot)
        outputs.update(contract.outputs)
        optional_outputs |= contract.optional_outputs
    resume_slot = next((each.resume_slot for each in contracts if each.resume_slot is not None), None)
    optional = frozenset(inputs.keys() - required)
    return Contract(name, inputs, outputs, optional, frozenset(optional_outputs), resume_slot)


class PipelineStage(ABC, Generic[In, Out]):
    """One stage of a pipeline. It has weights, but no state of requests.

    Subclass as PipelineStage[MyInput, MyOutput], which sets `Input`, `Output` and `contract`. bind() restricts the
    contract of an instance to the slots that its pipeline uses.
    """

    Input: ClassVar[type[Any]]
    Output: ClassVar[type[Any]]
    contract: Contract
    indifferent_to: ClassVar[frozenset[str] | None] = None
    """Scalar input fields, as slot.field, that do not affect run(). They may be zeroed, and outputs may be cached by
    the remaining inputs. None: outputs must not be cached."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__dict__.get("__orig_bases__", ()):
            types: tuple[Any, ...] = getattr(base, "__args__", ())
            if len(types) == 2 and all(isinstance(each, type) for each in types):
                cls.Input, cls.Output = types
        if "Input" in cls.__dict__:
            cls.contract = derive_contract(cls.__name__, cls.Input, cls.Output)

    def bind(self, contract: Contract) -> Self:
        """Restrict the stage to a contract that its own contract includes. Raises ValueError for any other contract."""
        if not self.contract.includes(contract):
            raise ValueError(f"{contract.name} is not part of the contract of {type(self).__name__}, {self.contract}")
        self.contract = contract
        return self

    def writes(self, slot: str) -> bool:
        """Return whether the pipeline reads an optional output, so that it must be computed."""
        return slot in self.contract.outputs

    @abstractmethod
    def run(self, x: In, call: Call) -> Out:
        """Compute the output, deterministically in `x`. Progress, warnings and items are reported through `call`."""
