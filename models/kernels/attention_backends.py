"""Attention by optional packages: FlashAttention 2, 3 and 4. Non-causal and without a mask.

q, k, v and results are (batch, tokens, heads, head size). Functions named *_with_lse() also return the log-sum-exp of
the scores, float32 (batch, heads, tokens).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_QUERY_TILES = {128: 128}
"""Rows (queries) of a tile of FlashAttention-3's kernel, by head size."""

_MAX_SPLITS = 8
"""Largest number of splits of the keys."""

_WAVES_PER_SPLIT = 0.02
"""Cost of merging one more split, in waves. A wave is one tile on each multiprocessor."""

_MIN_SAVING = 0.08
"""Smallest fraction of the waves that a separate call for the last heads must save."""


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by `flash-attn` 2, for Ampere, Ada and Hopper."""
    # An optional package for GPUs.
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(q, k, v)
    return out


def flash_attention_2_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """flash_attention_2() with the log-sum-exp."""
    # An optional package for GPUs.
    from flash_attn import flash_attn_func

    # The third result, the attention probabilities, is computed only with dropout.
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    return out, lse


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by `fa3-fwd`, for Hopper."""
    # An optional package for GPUs.
    import fa3_fwd_interface

    out: Tensor = fa3_fwd_interface.flash_attn_func(q, k, v)
    return out


def flash_attention_3_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """flash_attention_3() with the log-sum-exp."""
    # An optional package for GPUs.
    import fa3_fwd_interface

    result: tuple[Tensor, Tensor] = fa3_fwd_interface.flash_attn_func(q, k, v, return_attn_probs=True)
    return result


def flash_attention_3_into(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """Write flash_attention_3() to `out`, whose channels are adjacent; head_shares() plans the calls."""
    # The import registers torch.ops.fa3_fwd; the package's Python function has no argument `out`.
    import fa3_fwd_interface  # noqa: F401

    batch, tokens, heads, head_size = q.shape
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    tiles = batch * math.ceil(tokens / _QUERY_TILES[head_size]) if head_size in _QUERY_TILES else 0
    for share, splits in head_shares(tiles, heads, processors):
        parts = (each[:, :, share] for each in (q, k, v))
        torch.ops.fa3_fwd.fwd(*parts, out=out[:, :, share], num_splits=splits)
    return out


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by `flash-attn-4`, for Hopper and Blackwell."""
    out: Tensor = _flash_attention_4(q, k, v, return_lse=False)[0]
    return out


def flash_attention_4_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """flash_attention_4() with the log-sum-exp."""
    result: tuple[Tensor, Tensor] = _flash_attention_4(q, k, v, return_lse=True)
    return result


def _flash_attention_4(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool) -> Any:
    # An optional package for GPUs.
    from flash_attn.cute import flash_attn_func

    # The result is always a pair; without return_lse its second element is None.
    return flash_attn_func(q, k, v, return_lse=return_lse)


def head_shares(tiles: int, heads: int, processors: int) -> list[tuple[slice, int]]:
    """Plan kernel calls: for each call the heads, and the number of splits of the keys.

    A head has `tiles` tiles of queries, and each of `processors` multiprocessors computes one tile at a time. If the
    last wave is incomplete and a separate call for its heads saves enough waves, these heads get a call that splits the
    keys.
    """
    single_call = [(slice(0, heads), 1)]
    full = processors * (tiles * heads // processors) // tiles if tiles else heads
    rest = heads - full
    if not 0 < full < heads:
        return single_call

    def waves(splits: int) -> float:
        return math.ceil(tiles * rest * splits / processors) / splits

    splits = min(range(2, _MAX_SPLITS + 1), key=lambda each: waves(each) + _WAVES_PER_SPLIT * each)
    before, after = math.ceil(tiles * heads / processors), math.ceil(tiles * full / processors) + waves(splits)
    if after > (1 - _MIN_SAVING) * before:
        return single_call
    return [(slice(0, full), 1), (slice(full, heads), splits)]
