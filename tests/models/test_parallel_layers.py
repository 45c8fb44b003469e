"""Parallel layers compared with one rank: attention over sharded sequences, gathers of uneven chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from local_fleet import relative_error
from models.kernels.attention import attention, attention_with_lse, merge_attention
from models.parallel.mesh import AXES, Degrees
from rank_calls import rank_file
from rank_pool import RankFailed, RankPool

SEQUENCE_LAYOUTS = [
    Degrees(ulysses=2),
    Degrees(ring=2),
    Degrees(ulysses=4),
    Degrees(ring=4),
    Degrees(ulysses=2, ring=2),
    Degrees(tp=2, ring=2),
    Degrees(cfg=2, ulysses=2),
]


LENGTHS = [(13, 35), (1, 4), (3, 0), (1, 1)]
"""(text tokens, image tokens); in the last three cases, some ranks have no token of a segment."""


@pytest.mark.parametrize("degrees", SEQUENCE_LAYOUTS, ids=str)
def test_attention_over_a_sharded_sequence_equals_one_rank(
    rank_pool: RankPool, tmp_path: Path, degrees: Degrees
) -> None:
    torch.manual_seed(0)
    rank_pool.join(degrees)
    for text, image in LENGTHS:
        segments = {name: torch.randn(3, 2, tokens, 4, 8) for name, tokens in (("text", text), ("image", image))}
        whole = torch.cat(list(segments.values()), dim=2)
        save_file(segments, tmp_path / "in")
        sizes = rank_pool.call("rank_calls:attend", inputs=str(tmp_path / "in"), output=str(tmp_path / "out"))
        # Ranks that differ only on tp or cfg have the same shard.
        ranks = range(0, degrees.sp * degrees.tp, degrees.tp)
        assert [sum(sizes[rank][segment] for rank in ranks) for segment in (0, 1)] == [text, image]
        parts = [load_file(rank_file(str(tmp_path / "out"), rank)) for rank in ranks]
        got = torch.cat([part[name] for name in segments for part in parts], dim=1)
        assert relative_error(got, attention(*whole.unbind())) <= 1e-6, (text, image)


@pytest.mark.parametrize("degrees", SEQUENCE_LAYOUTS, ids=str)
def test_attention_of_all_queries_to_sharded_keys_equals_one_rank(
    rank_pool: RankPool, tmp_path: Path, degrees: Degrees
) -> None:
    """The result is byte-equal on every rank, even if some ranks have no keys."""
    torch.manual_seed(0)
    rank_pool.join(degrees)
    for keys in (35, 5, 3, 1):
        queries, key_values = torch.randn(2, 7, 4, 8), torch.randn(2, 2, keys, 4, 8)
        save_file({"queries": queries, "key_values": key_values}, tmp_path / "in")
        sizes = rank_pool.call("rank_calls:attend_whole", inputs=str(tmp_path / "in"), output=str(tmp_path / "out"))
        assert sum(sizes[rank] for rank in range(0, degrees.sp * degrees.tp, degrees.tp)) == keys
        files = [rank_file(str(tmp_path / "out"), rank) for rank in range(degrees.world_size)]
        got, *others = (load_file(file)["attended"] for file in files)
        assert relative_error(got, attention(queries, *key_values.unbind())) <= 1e-6, keys
        assert all(torch.equal(got, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_attention_of_key_shards_equals_attention_of_all_keys(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 3, 8, dtype=dtype) for tokens in (5, 9, 9))
    parts = [attention_with_lse(q, k[:, rows], v[:, rows]) for rows in (slice(0, 2), slice(2, 5), slice(5, None))]
    merged = merge_attention(merge_attention(parts[0], parts[1], torch.float32), parts[2], torch.float32)
    out, lse = attention_with_lse(q, k, v)
    scores = torch.einsum("bqhd,bkhd->bqhk", q.float(), k.float()) / 8**0.5
    max_error = 1e-6 if dtype == torch.float32 else 1e-2
    assert lse.dtype == merged[0].dtype == torch.float32
    assert relative_error(out, attention(q, k, v)) <= max_error
    assert relative_error(merged[0], out) <= max_error
    assert relative_error(merged[1], scores.logsumexp(-1)) <= max_error


def test_merging_attention_does_not_overflow_for_high_scores() -> None:
    """The log-sum-exp of the second shard is 200; exp(200) is infinite in float32."""
    out, lse = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), 200.0)
    merged, total = merge_attention(
        (torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -200.0)), (out, lse), torch.bfloat16
    )
    assert torch.equal(merged, out.bfloat16())
    assert torch.equal(total, lse)


def test_chunks_of_any_size_are_gathered(rank_pool: RankPool) -> None:
    rank_pool.join(Degrees(tp=4))
    assert rank_pool.call("rank_calls:gather", sizes=[2, 1, 0, 1]) == [[0.0, 0.0, 1.0, 3.0]] * 4


@pytest.mark.parametrize(
    ("degrees", "coordinates"),
    [
        (Degrees(tp=2, ulysses=2), [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 1, 1)]),
        (Degrees(ring=2, cfg=2), [(0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 0, 0)]),
    ],
    ids=str,
)
def test_neighbors_on_the_tp_axis_have_consecutive_ranks(
    rank_pool: RankPool, degrees: Degrees, coordinates: list[tuple[int, ...]]
) -> None:
    assert [tuple(rank[axis] for axis in AXES) for rank in rank_pool.join(degrees)] == coordinates


def test_the_error_of_a_failed_rank_is_raised(tmp_path: Path) -> None:
    pool = RankPool(tmp_path)
    pool.join(Degrees(tp=2))
    with pytest.raises(RankFailed, match="sizes"):
        pool.call("rank_calls:gather")
    pool.close()
