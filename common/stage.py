"""A stage is a function from one typed input to one typed output; its contract is derived from those two types."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from common.errors import Cancelled, DeadlineExceeded

if TYPE_CHECKING:
    from common.artifacts import DenoiseState

In = TypeVar("In")
Out = TypeVar("Out")

_OPTIONAL = re.compile(r"^(?P<kind>\w+) \| None$")


def _ignore(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Call:
    """What a stage may know about the request it works on, and whom it tells how it goes.

    `deadline` is in seconds of time.monotonic(). The tensors of a checkpoint are on the CPU and the listener's to keep:
    the stage does not write to them any more. `variant` is the model's variant whose stages run; empty means the first.
    """

    request_id: str
    on_progress: Callable[[int, int], None] = _ignore
    on_warning: Callable[[str, str], None] = _ignore
    on_checkpoint: Callable[[DenoiseState], None] = _ignore
    cancelled: threading.Event = field(default_factory=threading.Event)
    deadline: float | None = None
    variant: str = ""

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

    def seconds_left(self) -> float | None:
        """Time until the deadline, negative after it; None without one."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def warn(self, field: str, message: str) -> None:
        """Tell the caller what was done instead of what `field` asked for."""
        self.on_warning(field, message)


@dataclass(frozen=True)
class Contract:
    """The slots that a stage, or a run of stages, reads and writes, each with the name of its artifact."""

    name: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    optional_outputs: frozenset[str] = frozenset()


def derive_contract(name: str, inputs: type[Any], outputs: type[Any]) -> Contract:
    """Read a contract off two dataclasses whose fields are artifacts. Raises TypeError for anything else.

    Annotations are read as they are written, so that the artifacts' own imports (torch) are not needed.
    """
    read, optional = _slots(inputs)
    written, maybe = _slots(outputs)
    if maybe:
        raise TypeError(f"{outputs.__name__}: outputs cannot be optional: {', '.join(sorted(maybe))}")
    return Contract(name, read, written, optional)


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
        if not kind.isidentifier():
            raise TypeError(f"{cls.__name__}.{item.name}: {kind!r} is not an artifact or an optional one")
        slots[item.name] = kind
    return slots, frozenset(optional)


def compose_contracts(name: str, contracts: Sequence[Contract]) -> Contract:
    """The contract of a run of consecutive stages: what it needs from outside, and all that it writes."""
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}
    required: set[str] = set()
    for contract in contracts:
        for slot, kind in contract.inputs.items():
            if slot not in outputs:
                inputs[slot] = kind
                if slot not in contract.optional:
                    required.add(slot)
        outputs.update(contract.outputs)
    return Contract(name, inputs, outputs, frozenset(inputs.keys() - required))


class PipelineStage(ABC, Generic[In, Out]):
    """One function of a pipeline. It holds weights, never requests.

    Subclass as PipelineStage[MyInput, MyOutput]; `Input`, `Output` and `contract` are set from that.
    """

    Input: ClassVar[type[Any]]
    Output: ClassVar[type[Any]]
    contract: ClassVar[Contract]
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

    @abstractmethod
    def run(self, x: In, call: Call) -> Out:
        """Compute the output. Deterministic in x; anything the caller should hear goes through call."""
