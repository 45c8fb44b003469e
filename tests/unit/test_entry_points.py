"""Entry points of a DiT: sharded arguments, gathered results, and segment lengths during a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from models.dits.base import DiffusionTransformer, Predictions, Prepared, entry_point
from models.parallel import sequence_parallel
from models.parallel.mesh import AXES, Axis, Degrees, WorkerMesh
from models.parallel.plan import GatheredResult, ParallelPlan, ShardedArgument
from models.parallel.segment_lengths import SegmentScope
from models.parallel.sequence_parallel import shard_entry_points

CPU = torch.device("cpu")
PLAN = ParallelPlan(
    column=(),
    row=(),
    attention=(),
    token_segments={"text": "sharded", "image": "sharded", "audio": "replicated"},
    sharded_arguments=(
        ShardedArgument("prepare", "text", "text"),
        ShardedArgument("tokens", "image", "image"),
        ShardedArgument("tokens", "positions", "image", dim=0),
    ),
    gathered_results=(GatheredResult("tokens", "image", result="image"),),
)


class FakeDit(DiffusionTransformer):
    """A fake DiT that adds the sum of this rank's text to its image and records its calls."""

    def __init__(self, scope: SegmentScope) -> None:
        super().__init__()
        self.scope = scope
        self.calls: list[tuple[str, int, Mapping[str, int]]] = []

    @entry_point
    def prepare(self, timesteps: Tensor, text: Tensor) -> Prepared:  # type: ignore[override]
        """Return the text as a constant."""
        self._record("prepare", text)
        return Prepared({"time": timesteps}, {"text": text})

    @entry_point
    def predict(  # type: ignore[override]
        self, image: Tensor, time: Tensor, text: Tensor, *, fails: bool = False
    ) -> Predictions:
        """Return the image plus the time and the sum of the text."""
        self._record("predict", image)
        predictions = self.tokens(image + time, torch.arange(image.shape[1]), text, fails=fails)
        self._record("predict", image)
        return predictions

    @entry_point
    def tokens(self, image: Tensor, positions: Tensor, text: Tensor, *, fails: bool) -> dict[str, Tensor]:
        """Return the tokens plus the sum of the text."""
        self._record("tokens", image)
        assert len(positions) == image.shape[1]
        if fails:
            raise KeyError("no tokens")
        return {"image": image + text.sum()}

    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """Return the number of elements of the latents."""
        del constants
        return latents["image"].numel()

    def _record(self, method: str, tensor: Tensor) -> None:
        self.calls.append((method, tensor.shape[1], dict(self.scope.current.lengths)))


class DoubledText(FakeDit):
    """A subclass whose prepare() passes two copies of the text to its base class."""

    @entry_point
    def prepare(self, timesteps: Tensor, text: Tensor) -> Prepared:  # type: ignore[override]
        """Prepare two concatenated copies of the text."""
        return super().prepare(timesteps, torch.cat((text, text), dim=1))


class Unrecorded(FakeDit):
    """A FakeDit without records, which torch.compile() can trace."""

    def _record(self, method: str, tensor: Tensor) -> None:
        pass


def mesh_of(degrees: Degrees) -> WorkerMesh:
    return WorkerMesh(degrees, CPU, 0, {axis: Axis(degrees.of(axis)) for axis in AXES})


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeDit:
    """The model of the first of two ranks; the fake gather repeats its chunk for the second rank."""
    return sharded(monkeypatch, FakeDit)


def sharded(monkeypatch: pytest.MonkeyPatch, kind: type[FakeDit]) -> FakeDit:
    def gather(chunk: Tensor, dim: int, sizes: list[int], axis: Axis) -> Tensor:
        assert axis.size == 2
        return torch.cat([chunk.narrow(dim, 0, min(size, chunk.shape[dim])) for size in sizes], dim=dim)

    monkeypatch.setattr(sequence_parallel, "gather_chunks", gather)
    scope = SegmentScope(2, 0)
    model = kind(scope)
    shard_entry_points(model, PLAN, mesh_of(Degrees(ulysses=2)), scope)
    return model


def predict(model: FakeDit, tokens: int = 7, text: int = 3, **flags: Any) -> Tensor:
    prepared = model.prepare(torch.ones(1, 1), torch.ones(1, text))
    return model.predict(torch.zeros(1, tokens), **prepared.inputs(0), **flags)["image"]


def test_calls_get_chunks_and_return_gathered_results(model: FakeDit) -> None:
    assert predict(model).tolist() == [[3.0] * 7], "1 for the time, 2 for two of three text tokens"
    assert model.calls == [
        ("prepare", 2, {"text": 3}),
        ("predict", 7, {"text": 3}),
        ("tokens", 4, {"text": 3, "image": 7}),
        ("predict", 7, {"text": 3}),
    ]


def test_interleaved_requests_retain_their_segment_lengths(model: FakeDit) -> None:
    """Calls of guidance branches and of concurrent requests are interleaved."""
    prepared = [model.prepare(torch.ones(1, 1), torch.ones(1, text)) for text in (3, 4)]
    assert [each.lengths for each in prepared] == [{"text": 3}, {"text": 4}]
    assert [each.constants["text"].shape[1] for each in prepared] == [2, 2]
    del model.calls[:]
    for each in (*prepared, prepared[0]):
        model.predict(torch.zeros(1, 7), **each.inputs(0))
    assert [lengths["text"] for method, _, lengths in model.calls if method == "tokens"] == [3, 4, 3]


def test_lengths_are_reset_after_an_exception(model: FakeDit) -> None:
    with pytest.raises(KeyError, match="no tokens"):
        predict(model, fails=True)
    with pytest.raises(RuntimeError, match="outside a call of an entry point"):
        _ = model.scope.current
    predict(model, text=5, tokens=2)
    assert model.calls[-1] == ("predict", 2, {"text": 5})


def test_a_prediction_requires_the_prepared_lengths(model: FakeDit) -> None:
    prepared = model.prepare(torch.ones(1, 1), torch.ones(1, 3))
    given: dict[str, Any] = {**prepared.row(0), **prepared.constants}
    with pytest.raises(TypeError, match=r"predict\(\) lacks text_length"):
        model.predict(torch.zeros(1, 7), **given)


def test_arguments_of_a_segment_must_have_one_length(model: FakeDit) -> None:
    with pytest.raises(ValueError, match=r"tokens\(\): positions has 6 tokens, and other arguments of image have 7"):
        model.tokens(torch.zeros(1, 7), torch.arange(6), torch.ones(1, 1), fails=False)


def test_a_method_of_a_base_class_is_not_sharded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharded(monkeypatch, DoubledText)
    prepared = model.prepare(torch.ones(1, 1), torch.ones(1, 3))
    assert (prepared.lengths, prepared.constants["text"].shape) == ({"text": 3}, (1, 4))


def test_entry_points_on_one_device_get_whole_arguments() -> None:
    scope = SegmentScope(1, 0)
    model = FakeDit(scope)
    with scope.entered({}):
        assert predict(model).tolist() == [[4.0] * 7]
    assert model.calls[2] == ("tokens", 7, {})


def test_entry_points_compile_to_one_graph() -> None:
    """predict() compiles with `fullgraph=True`, unsharded and with sharded entry points."""
    scope = SegmentScope(1, 0)
    plain, sharded_on_one_rank = Unrecorded(scope), Unrecorded(scope)
    shard_entry_points(sharded_on_one_rank, PLAN, mesh_of(Degrees()), scope)
    for model in (plain, sharded_on_one_rank):
        prepared = model.prepare(torch.ones(1, 1), torch.ones(1, 3))
        compiled = torch.compile(model.predict, fullgraph=True, backend="eager")
        for tokens in (7, 5):
            assert compiled(torch.zeros(1, tokens), **prepared.inputs(0))["image"].tolist() == [[4.0] * tokens]
