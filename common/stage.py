"""A stage is a function from one typed input to one typed output; its contract is derived from those two types."""

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
"""Metadata of the input field that holds the checkpoint from which a stage continues: its resume slot."""

STEP_CHECKPOINTS = "checkpoint"
"""The stream of step checkpoints, which every stage may emit and no stage declares. No slot has this name."""

_OPTIONAL = re.compile(r"^(?P<kind>[\w\[\]]+) \| None$")
_STREAM = re.compile(r"^Stream\[(?P<item>\w+)\]$")


class Stream(Protocol[Item]):
    """A slot with any number of artifacts, in order: its reader starts before its writer ends.

    A stage declares it as `Stream[Latents]`. As an input it is iterated once: it waits for each item, and raises
    Cancelled or DeadlineExceeded while it waits. As an output its items are given to Call.emit(), and the field has the
    value EMITTED.
    """

    def __iter__(self) -> Iterator[Item]:
        """Yield the artifacts in order."""

    def has_next(self) -> bool:
        """Whether an item is there, so that its reader would not wait for it."""


class _Emitted:
    """The value of a stream among the outputs that a stage returns."""

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("the items of a stream output went to Call.emit()")

    def has_next(self) -> bool:
        raise TypeError("the items of a stream output went to Call.emit()")


EMITTED: Stream[Any] = _Emitted()
"""The value of a stream in the output that a stage returns: the items went to Call.emit()."""


def item_kind(kind: str) -> str | None:
    """The message of a stream's items, where `kind` in a contract is that of a stream, such as "Stream[Latents]"."""
    match = _STREAM.match(kind)
    return match["item"] if match else None


class ItemSink(Protocol):
    """Takes the items of one stream from a runner."""

    async def put(self, index: int, item: Any, byte_size: int) -> None:
        """Take the item with this index, in the form of the runner's values.

        Returns once the writer may go on: a slow reader delays it. An index that was taken before is ignored.
        """


def _ignore(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Call:
    """A request as its stages see it: its name, its deadline, and the callbacks to which its runner reports.

    `deadline` is in seconds of time.monotonic(). `on_begun` is called when the stages start, `on_item` with the slot,
    the index and the artifact of each item that a stage emits; it may block, so that a slow reader delays the stage.
    Runners replace it: they put the items of a stream, in the form of their values, into that of `sinks` which has the
    stream's name, and drop those of other streams. A stage's thread waits for items and for readers in the context
    `waiting`, in which others may use the device. `on_computed` gets the compute seconds that a worker reports at the
    end of the call, also of a call that it hands over. `hand_over` is set when the worker leaves: a stage that sends
    checkpoints ends at its next step boundary then. `variant` is the model's variant whose stages run; empty means the
    first. `tokens` is the work of one step, as StageWork counts it; 0 where the caller does not send it.
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
    """The index of the next item of each stream."""

    def emit(self, slot: str, artifact: Any, index: int | None = None) -> None:
        """Send the next item of a stream to its reader. Blocks while the reader is too far behind, until cancellation.

        `index` counts the items of the stream from 0; a stage that resumes gives the index that the item had before.
        The item's tensors are on the CPU, and the stage does not write to them any more.
        """
        number = self.emitted.get(slot, 0) if index is None else index
        self.emitted[slot] = number + 1
        self.on_item(slot, number, artifact)

    def checkpoint(self, state: Any) -> None:
        """Emit a StepCheckpoint. Only the newest one matters: it replaces one that waits to be sent."""
        self.emit(STEP_CHECKPOINTS, state)

    def progress(self, step: int, total_steps: int) -> None:
        """Report a finished step. Raises as check_cancelled, so that the loop ends within one step."""
        self.check_cancelled()
        self.on_progress(step, total_steps)

    def check_cancelled(self) -> None:
        """Raise Cancelled when the caller has gone, DeadlineExceeded when the result is no longer of use."""
        if self.cancelled.is_set():
            raise Cancelled(f"request {self.request_id} was cancelled")
        if (left := self.seconds_left()) is not None and left <= 0:
            raise DeadlineExceeded(f"request {self.request_id} is past its deadline")

    def must_hand_over(self) -> bool:
        """Whether the stage ends at this step boundary, with a checkpoint and HandedOver. All ranks get one answer."""
        return self.hand_over.is_set()

    def seconds_left(self) -> float | None:
        """Time until the deadline, negative after it; None without one."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def warn(self, field: str, message: str) -> None:
        """Tell the caller what was done instead of what `field` asked for."""
        self.on_warning(field, message)


@dataclass(frozen=True)
class Contract:
    """The slots that a stage, or a run of stages, reads and writes, each with the message of its artifact.

    `optional` inputs may be absent. `optional_outputs` are computed only where a pipeline reads them. `resume_slot` is
    the input with the checkpoint to continue from; None where the work always starts anew.
    """

    name: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    optional_outputs: frozenset[str] = frozenset()
    resume_slot: str | None = None

    @property
    def input_streams(self) -> frozenset[str]:
        """The inputs that are streams."""
        return frozenset(slot for slot, kind in self.inputs.items() if item_kind(kind))

    @property
    def output_streams(self) -> frozenset[str]:
        """The outputs that are streams."""
        return frozenset(slot for slot, kind in self.outputs.items() if item_kind(kind))

    def reading(self, *names: str) -> Contract:
        """The contract with these optional inputs only, beside the required ones and the resume slot.

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
        """The contract with these optional outputs only, beside the required ones. None of its outputs is optional."""
        dropped = self.optional_outputs.difference(names)
        outputs = {slot: kind for slot, kind in self.outputs.items() if slot not in dropped}
        return replace(self, outputs=outputs, optional_outputs=frozenset())

    def includes(self, part: Contract) -> bool:
        """Whether `part` is this contract, but for optional slots that it lacks."""
        whole = self.reading(*(part.optional & self.optional)).writing(part.outputs)
        return (part.inputs, part.outputs) == (whole.inputs, whole.outputs)


def derive_contract(name: str, inputs: type[Any], outputs: type[Any]) -> Contract:
    """Read a contract off two dataclasses whose fields are artifacts. Raises TypeError for anything else.

    Annotations are read as they are written, so that the artifacts' own imports (torch) are not needed.
    """
    read, optional = _slots(inputs)
    written, optional_outputs = _slots(outputs)
    return Contract(name, read, written, optional, optional_outputs, _resume_slot(inputs, optional))


def _resume_slot(inputs: type[Any], optional: frozenset[str]) -> str | None:
    """The field that is marked with RESUME. Raises TypeError where it is required, or not the only one."""
    marked = [item.name for item in dataclasses.fields(inputs) if item.metadata == RESUME]
    if len(marked) > 1 or not optional.issuperset(marked):
        raise TypeError(
            f"{inputs.__name__}: {', '.join(marked)} is not one optional field; a stage has one resume slot"
        )
    return marked[0] if marked else None


def _slots(cls: type[Any]) -> tuple[dict[str, str], frozenset[str]]:
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} must be a dataclass of artifacts")
    slots: dict[str, str] = {}
    optional: set[str] = set()
    for item in dataclasses.fields(cls):
        kind = item.type if isinstance(item.type, str) else getattr(item.type, "__name__", str(item.type))
        if match := _OPTIONAL.match(kind):
            kind = match["kind"]
            optional.add(item.name)
        of_stream = item_kind(kind)
        if not (of_stream or kind).isidentifier():
            raise TypeError(f"{cls.__name__}.{item.name}: {kind!r} is not an artifact, an optional one or a stream")
        slots[item.name] = f"Stream[{message_name(of_stream)}]" if of_stream else message_name(kind)
    return slots, frozenset(optional)


def compose_contracts(name: str, contracts: Sequence[Contract]) -> Contract:
    """The contract of a run of consecutive stages: what it needs from outside, and all that it writes."""
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
    """One function of a pipeline. It holds weights, never requests.

    Subclass as PipelineStage[MyInput, MyOutput]; `Input`, `Output` and `contract` are set from that. bind() narrows
    the contract of one stage to the slots that its pipeline uses.
    """

    Input: ClassVar[type[Any]]
    Output: ClassVar[type[Any]]
    contract: Contract
    indifferent_to: ClassVar[frozenset[str] | None] = None
    """Numbers and texts among the inputs, as slot.field, that make no difference to run(): it may get zeros in their
    place, and its outputs may be kept and given again for equal inputs. None: not to be kept."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__dict__.get("__orig_bases__", ()):
            types: tuple[Any, ...] = getattr(base, "__args__", ())
            if len(types) == 2 and all(isinstance(each, type) for each in types):
                cls.Input, cls.Output = types
        if "Input" in cls.__dict__:
            cls.contract = derive_contract(cls.__name__, cls.Input, cls.Output)

    def bind(self, contract: Contract) -> Self:
        """Use only the optional slots of this contract. Raises ValueError where it is not part of the stage's own."""
        if not self.contract.includes(contract):
            raise ValueError(f"{contract.name} is not part of the contract of {type(self).__name__}, {self.contract}")
        self.contract = contract
        return self

    def writes(self, slot: str) -> bool:
        """Whether an optional output is read by the pipeline, so that it must be computed."""
        return slot in self.contract.outputs

    @abstractmethod
    def run(self, x: In, call: Call) -> Out:
        """Compute the output. Deterministic in x; anything the caller should hear goes through call."""
