"""Fake CUDA graphs for CPU tests: a capture records operations with addresses, a replay repeats them.

As with CUDA, a capture computes nothing, a replay runs no Python code of the denoiser, the graph does not own tensors
that existed before the capture, and graphs of one pool overwrite each other's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from models.dits.base import Predictions
from models.stages.step_memory import Captured

Written = tuple[Tensor, Tensor]
"""A tensor that an operation will overwrite, and a copy of its previous values."""
DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operations that read values on the host, which a stream capture does not permit."""


@dataclass(frozen=True, eq=False)
class Address:
    """A tensor in memory that the graph does not own."""

    storage: StorageWeakRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Address:
        """Return the address of a tensor."""
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        return cls(storage, tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())

    def tensor(self) -> Tensor:
        """The tensor at this address. Raises AssertionError if its owner has freed the memory."""
        assert not self.storage.expired(), "the graph reads memory that was freed"  # type: ignore[no-untyped-call]
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


class Operation(NamedTuple):
    """A recorded operation and the tensors that it allocated. Outside tensors in arguments are addresses."""

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    made: Sequence[Tensor | None]
    """Tensors of the result. None: a view, or a tensor updated in place."""

    def run(self) -> None:
        """Recompute the result into the tensors that the operation allocated."""
        args, kwargs = changed(self.args, _tensor), {name: changed(each, _tensor) for name, each in self.kwargs.items()}
        for made, again in zip(self.made, tensors_in(self.function(*args, **kwargs)), strict=True):
            if made is not None:
                made.copy_(again)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations of a call; undo() restores the outside memory that they have overwritten."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[Operation] = []
        self._views: list[object] = []
        self._written: list[Written] = []
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run and record an operation. Raises RuntimeError if it reads values on the host."""
        del types
        if DEPENDS_ON_VALUES & set(func.tags):
            raise RuntimeError(f"{func} is not permitted when stream is capturing")
        kwargs = kwargs or {}
        writes = False
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                writes = True
                written = args[position] if position < len(args) else kwargs.get(argument.name)
                self._written += [(each, each.clone()) for each in tensors_in(written)]
        result = func(*args, **kwargs)
        given = {_memory(each) for each in tensors_in((args, list(kwargs.values())))}
        made = [None if _memory(each) in given else each for each in tensors_in(result)]
        owned = {_memory(each) for each in made if each is not None}
        self._made |= owned
        # All memory is retained, so that no address is reused. Views launch no kernel.
        if owned or writes:
            self._calls.append(Operation(func, args, kwargs, made))
        else:
            self._views.append((args, kwargs, result))
        return result

    def undo(self) -> None:
        """Restore the overwritten values."""
        for tensor, before in reversed(self._written):
            tensor.copy_(before)

    def owns(self, tensor: Tensor) -> bool:
        """Whether an operation has allocated the tensor's memory."""
        return _memory(tensor) in self._made

    def operations(self) -> list[Operation]:
        """The recorded operations, without references to outside memory."""
        return [
            call._replace(
                args=changed(call.args, self._reference),
                kwargs={name: changed(each, self._reference) for name, each in call.kwargs.items()},
            )
            for call in self._calls
        ]

    def _reference(self, value: Any) -> Any:
        # A tensor without dimensions stands for a number, a kernel parameter whose value is copied at the launch.
        if not isinstance(value, Tensor) or value.ndim == 0 or self.owns(value):
            return value
        return Address.of(value)


@dataclass
class FakeGraph:
    """A captured graph: recorded operations and the buffers of their predictions."""

    operations: list[Operation]
    predictions: Predictions
    outputs: list[Tensor]
    pool: list[FakeGraph]
    replays: int = 0

    @torch.inference_mode()
    def replay(self) -> None:
        """Compute the predictions, and invalidate the predictions of other graphs of the pool."""
        self.replays += 1
        for graph in self.pool:
            graph.overwrite()
        for operation in self.operations:
            operation.run()

    def overwrite(self) -> None:
        """Overwrite the predictions with invalid values."""
        for output in self.outputs:
            output.fill_(torch.nan)


@dataclass
class FakeCapture:
    """Captures fake graphs in one pool; each reports `byte_size` bytes."""

    byte_size: int = 0
    graphs: list[FakeGraph] = field(default_factory=list)

    @torch.inference_mode()
    def __call__(self, run: Callable[[], Predictions]) -> Captured:
        """Capture the operations of a call and undo their writes. Raises RuntimeError for host reads."""
        recorder = Recorder()
        with recorder:
            predictions = run()
        recorder.undo()
        outputs = [each for each in predictions.values() if recorder.owns(each)]
        graph = FakeGraph(recorder.operations(), predictions, outputs, self.graphs)
        graph.overwrite()
        self.graphs.append(graph)
        return Captured(graph, predictions, self.byte_size)

    @property
    def replays(self) -> int:
        """Number of replays of all graphs."""
        return sum(graph.replays for graph in self.graphs)


def changed(values: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to a value, or to each element of a nested list or tuple."""
    return [changed(each, change) for each in values] if isinstance(values, list | tuple) else change(values)


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in the arguments or the result of an operation."""
    if isinstance(values, list | tuple):
        return [tensor for each in values for tensor in tensors_in(each)]
    return [values] if isinstance(values, Tensor) else []


def _tensor(value: Any) -> Any:
    return value.tensor() if isinstance(value, Address) else value


def _memory(tensor: Tensor) -> int:
    """Address of the tensor's storage."""
    return tensor.untyped_storage().data_ptr()
