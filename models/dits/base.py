"""Interface of all diffusion transformers: prepare() runs once per request, predict() once per step."""

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
"""Predictions by the names of predict()'s latents arguments."""


@dataclass(frozen=True)
class MemorySpec:
    """Shape and dtype of a tensor that predict() updates in place, such as a KV cache. The caller allocates zeros."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def byte_size(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Prepared:
    """Inputs of predict() for all steps of a request, without the latents.

    `steps` are tensors (steps, ...) with one row per step; `constants` are tensors for all steps; `memory` specifies
    tensors that the caller allocates at fixed addresses. The names in all three are keywords of predict(). `lengths`
    are the full lengths of the token segments that a parallel plan sharded in prepare(); empty without a plan.
    """

    steps: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    memory: Mapping[str, MemorySpec] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)

    def row(self, step: int) -> dict[str, Tensor]:
        """The rows of one step, by keyword."""
        return {name: rows[step] for name, rows in self.steps.items()}

    @property
    def flags(self) -> dict[str, int]:
        """`lengths` as static keywords of predict(): part of the key of a captured CUDA graph."""
        return {length_keyword(segment): length for segment, length in self.lengths.items()}

    def inputs(self, step: int) -> dict[str, Any]:
        """Keywords of predict() in one step, without latents and memory."""
        return {**self.row(step), **self.constants, **self.flags}


def length_keyword(segment: str) -> str:
    """Name of predict()'s keyword for the full length of a token segment."""
    return f"{segment}_length"


ShardedForm = Callable[..., Any]
"""Replacement of an entry point. Its first argument is the bound single-device method."""

_ENTRY_POINTS: set[Callable[..., Any]] = set()


def entry_point(
    method: Callable[Concatenate[Model, Parameters], Result],
) -> Callable[Concatenate[Model, Parameters], Result]:
    """Decorator for methods of a DiT whose arguments and results a parallel plan may shard.

    Without a plan the method runs unchanged.
    """

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
    """Denoiser: predicts, for example, a velocity from latents, a timestep and conditioning.

    forward() runs prepare() and predict() for a single step.
    """

    block_linears: tuple[str, ...]
    """Path patterns of the large linear layers in attention and feed-forwards. Set by the loader."""

    def __init__(self) -> None:
        super().__init__()
        self._sharded_forms: dict[Callable[..., Any], ShardedForm] = {}

    @abstractmethod
    def prepare(self, timesteps: Tensor, **conditioning: Any) -> Prepared:
        """Compute everything that does not depend on the latents, from timesteps (steps, B) and conditioning.

        Timesteps are (steps, B, segments) if token segments have different timesteps. `conditioning` are further
        keywords of forward(). All timesteps are embedded in one batch, which reads the weights of the embedding once
        per request instead of once per step.
        """

    @abstractmethod
    def predict(self, *, use: CacheUse | None = None, **inputs: Any) -> Predictions:
        """Predict one step. Keywords are the latents, a row of Prepared.steps, Prepared.constants and the memory.

        The method never reads tensor values on the host, so that a CUDA graph can capture it. `use` states how this
        step uses the step cache; None: there is no step cache. All further keywords are static flags of a guidance
        branch or of a call.
        """

    @abstractmethod
    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """Upper bound of the number of elements of the residual stream (B, S, D) for these latents."""

    def cached_tensors(self, latents: Mapping[str, Tensor]) -> object:
        """Tensors that predict() reads from a module-level cache for these latents, such as RoPE angles.

        A captured CUDA graph reads these tensors at fixed addresses: the graph's owner must hold references to them.
        """
        del latents
        return None

    def sharded_form(self, entered: Callable[..., Any]) -> ShardedForm | None:
        """The sharded form of an entry point; None: no plan shards it."""
        return self._sharded_forms.get(entered)

    def shard_entry_point(self, name: str, form: ShardedForm) -> None:
        """Replace an entry point with its sharded form. Raises TypeError for a method that is not an entry point."""
        self._sharded_forms[self._entry_point(name)] = form

    def entry_point_signature(self, name: str) -> inspect.Signature:
        """Signature of an entry point, without self. Raises TypeError for a method that is not an entry point."""
        return inspect.signature(partial(self._entry_point(name), self))

    def _entry_point(self, name: str) -> Callable[..., Any]:
        entered: Callable[..., Any] | None = getattr(type(self), name, None)
        if entered not in _ENTRY_POINTS:
            raise TypeError(
                f"{type(self).__name__}.{name} is not an entry point; mark it with @entry_point to shard it"
            )
        return entered
