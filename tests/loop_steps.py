"""Single steps of the loop family: seeded inputs, and reference predictions of eager steps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from loop_family import SHAPES, LoopTransformer
from models.dits.base import Predictions
from models.stages.predictor import predict_step
from models.stages.step_memory import NO_FLAGS, Flags, StepInputs, StepKind, StepMemory, byte_size_of

NO_KEYWORDS: Mapping[str, Hashable] = MappingProxyType({})


def loop_step(
    transformer: LoopTransformer, seed: int = 0, *, batch: int = 2, flags: Mapping[str, Hashable] = NO_KEYWORDS
) -> StepInputs:
    """Inputs of a step with `batch` outputs. Shapes depend on `batch` only, values on `seed`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    prepared = transformer.prepare(1000 * draw(3, batch), text=draw(batch, 3))
    latents = {"video": draw(batch, *SHAPES["video"][1:]), "sound": draw(batch, *SHAPES["audio"][1:])}
    return StepInputs(latents, prepared.row(0), prepared.constants, prepared.memory, flags)


def tensor_bytes(transformer: LoopTransformer, step: StepInputs) -> int:
    """Bytes of step memory that the step needs: tensors and buffers for graphs, without a step cache."""
    return byte_size_of(transformer, step, has_cache=False, has_graphs=True)


def predict(memory: StepMemory, step: StepInputs, flags: Flags = NO_FLAGS) -> Predictions:
    """Predict a step with leased step memory."""
    return predict_step(memory, step.latents, step.row, StepKind(flags=flags))


class EagerBranch:
    """Reference: the steps of one branch, called directly on the transformer without StepMemory."""

    def __init__(self, transformer: LoopTransformer, first: StepInputs) -> None:
        self._transformer = transformer
        self._constants = first.constants
        self._flags = first.flags
        self._memory = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in first.memory.items()}

    def predict(self, step: StepInputs, flags: Flags = NO_FLAGS) -> Predictions:
        """Predict a step with the constants of the first step."""
        given = {**step.latents, **step.row, **self._constants, **self._memory}
        before = self._transformer.eager_calls
        predictions = self._transformer.predict(**given, **{**self._flags, **dict(flags)})  # type: ignore[arg-type]
        self._transformer.eager_calls = before
        return predictions


def equal(one: Predictions, other: Predictions) -> bool:
    """Whether two sets of predictions have equal names and values."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copied(predictions: Predictions) -> dict[str, Tensor]:
    """Clone predictions, as later steps reuse their memory."""
    return {name: each.clone() for name, each in predictions.items()}
