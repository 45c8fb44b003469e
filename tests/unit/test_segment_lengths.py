"""Token segments of ranks: chunks of any length, and the segment lengths of the current call."""

from __future__ import annotations

import pytest
import torch

from models.parallel.segment_lengths import SegmentLengths, SegmentScope, chunk_sizes


@pytest.mark.parametrize("parts", range(1, 6))
@pytest.mark.parametrize("length", [0, 1, 4, 13, 35])
def test_chunk_lengths_equal_those_of_tensor_split(length: int, parts: int) -> None:
    whole = torch.arange(length)
    chunks = torch.tensor_split(whole, parts)
    assert chunk_sizes(length, parts) == tuple(len(chunk) for chunk in chunks)
    for index, chunk in enumerate(chunks):
        assert torch.equal(SegmentLengths(parts, index, {"image": length}).local(whole, 0, "image"), chunk)


def test_each_segment_is_sharded_separately() -> None:
    lengths = SegmentLengths(4, 1, {"text": 13, "image": 35})
    assert lengths.local(torch.zeros(2, 13), 1, "text").shape == (2, 3)
    assert lengths.local(torch.zeros(35, 1), 0, "image").shape == (9, 1)
    assert lengths.of("text") == (4, 3, 3, 3)
    assert lengths.sizes == (4 + 9, 3 + 9, 3 + 9, 3 + 8)


def test_a_nested_call_adds_segment_lengths() -> None:
    scope = SegmentScope(2, 0)
    with scope.entered({"text": 13}):
        with scope.entered({"image": 35, "text": 13}) as inner:
            assert scope.current is inner
            assert inner == SegmentLengths(2, 0, {"text": 13, "image": 35})
        assert scope.current.lengths == {"text": 13}
    with scope.entered({"text": 6}):
        assert scope.current.sizes == (3, 3), "the other guidance branch has another text length"


def test_lengths_are_restored_after_an_exception() -> None:
    scope = SegmentScope(2, 0)
    with scope.entered({"text": 13}):
        with pytest.raises(KeyError), scope.entered({"image": 35}):
            raise KeyError
        assert scope.current.lengths == {"text": 13}
    with pytest.raises(RuntimeError, match="outside a call of an entry point"):
        _ = scope.current


def test_another_length_for_a_segment_is_refused() -> None:
    scope = SegmentScope(2, 0)
    refused = pytest.raises(ValueError, match="text: 12 tokens is not the segment's length, 13")
    with scope.entered({"text": 13}), refused, scope.entered({"text": 12}):
        pass


def test_reading_lengths_outside_a_call_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="outside a call of an entry point"):
        _ = SegmentScope(2, 0).current
