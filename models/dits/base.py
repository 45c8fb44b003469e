"""The interface of all diffusion transformers: work of a request is separate from the work of every step."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from models.layers.step_cache import CacheUse

Model = TypeVar("Model", bound="DiffusionTransformer")
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

Predictions = Mapping[str, Tensor]
"""A prediction for each latents argument of predict(), under the argument's name."""


@dataclass(frozen=True)
class MemorySpec:
    """A tensor that predict() reads and updates in place, such as a KV cache: at a fixed address, zeros at first."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def byte_size(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Prepared:
    """Inputs of a request's steps besides the latents.

    `steps` are tensors (steps, ...), with a row for each step, `constants` the same for all steps; both are keywords of
    predict(), and so is `memory`, which the caller allocates. `lengths` are the whole lengths of the token segments
    that prepare() sharded between ranks, by segment.
    """

    steps: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    memory: Mapping[str, MemorySpec] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)

    def row(self, step: int) -> dict[str, Tensor]:
        """The tensors of one step."""
        return {name: rows[step] for name, rows in self.steps.items()}

    @property
    def flags(self) -> dict[str, int]:
        """The lengths as keywords of predict(): static, so that graphs of other lengths have other keys."""
        return {length_keyword(segment): length for segment, length in self.lengths.items()}

    def inputs(self, step: int) -> dict[str, Any]:
        """The keywords of predict() at a step, but for latents and memory."""
        return {**self.row(step), **self.constants, **self.flags}


def length_keyword(segment: str) -> str:
    """The keyword of predict() for the whole length of a token segment."""
    return f"{segment}_length"


ShardedForm = Callable[..., Any]
"""Called in place of an entry point, with the single-device method before its arguments."""

_ENTRY_POINTS: set[Callable[..., Any]] = set()


def entry_point(
    method: Callable[Concatenate[Model, Parameters], Result],
) -> Callable[Concatenate[Model, Parameters], Result]:
    """Declare a method of a DiT whose arguments and result a parallel plan may shard. One device calls it as it is."""

    @wraps(method)
    def entered(model: Model, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        form = model.sharded_form(entered)
        if form is None:
            return method(model, *args, **kwargs)
        result: Result = form(partial(method, model), *args, **kwargs)
        return result

    _ENTRY_POINTS.add(entered)
    return entered


class DiffusionTransformer(nn.Module, ABC):
    """Predicts from latents, a timestep and conditioning; forward() takes the keywords of Diffusers' model."""

    block_linears: tuple[str, ...]
    """The large linear layers, of the blocks' attention and feed-forwards, as patterns of their paths.

    The loader sets them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sharded_forms: dict[Callable[..., Any], ShardedForm] = {}

    @abstractmethod
    def prepare(self, timesteps: Tensor, **conditioning: Any) -> Prepared:
        """Compute what does not depend on the latents, for timesteps (steps, B) and forward's other keywords.

        A model whose token segments have timesteps of their own takes (steps, B, segments).
        Embedding every step's timestep at once reads the weights for it once a request, instead of once a step.
        """

    @abstractmethod
    def predict(self, *, use: CacheUse | None = None, **inputs: Any) -> Predictions:
        """Predict for latents, with a row of Prepared.steps, Prepared.constants and the memory.

        A function of its tensors that never reads their values on the host, so that a CUDA graph can capture it. `use`
        says how a step cache is used, if there is one. Other keywords than those of latents, rows, constants and memory
        are the static flags of a branch.
        """

    @abstractmethod
    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """An upper bound of the elements in the residual stream (B, S, D) of a prediction for these latents."""

    def cached_tensors(self, latents: Mapping[str, Tensor]) -> object:
        """Tensors that predict() reads from a cache of the module for latents of these shapes, such as rotations.

        A captured CUDA graph reads them at fixed addresses, so that the owner of the graph has to keep them.
        """
        del latents
        return None

    def sharded_form(self, entered: Callable[..., Any]) -> ShardedForm | None:
        """The sharded form of an entry point; None: there is one rank."""
        return self._sharded_forms.get(entered)

    def shard_entry_point(self, name: str, form: ShardedForm) -> None:
        """Call the sharded form in place of an entry point. Raises TypeError for a method that is no entry point."""
        self._sharded_forms[self._entry_point(name)] = form

    def entry_point_signature(self, name: str) -> inspect.Signature:
        """The arguments of an entry point, without self. Raises TypeError for a method that is no entry point."""
        return inspect.signature(partial(self._entry_point(name), self))

    def _entry_point(self, name: str) -> Callable[..., Any]:
        entered: Callable[..., Any] | None = getattr(type(self), name, None)
        if entered not in _ENTRY_POINTS:
            raise TypeError(f"{type(self).__name__}.{name} is not an entry point, which a plan needs to shard it")
        return entered
