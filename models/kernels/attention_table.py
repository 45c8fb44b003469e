"""Table of attention backends by GPU and shape.

The table is part of the code, not tuned at run time, so that workers with the same GPU give bit-identical results.
tests/bench/attention.py measures the backends. `work` is batch x heads x min(query tokens, key tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from common.errors import InvalidInput
from models.kernels.packages import ATTENTION_PACKAGES, AttentionBackend, AttentionChoice, Capability, PackageName

_MAX_HEAD_SIZE = 128

_MIN_KEYS: dict[AttentionBackend, int] = {"cudnn": 2}
"""Smallest number of keys that a backend supports; 1 for all other backends."""


class Row(NamedTuple):
    """A backend, and the smallest work for which it is chosen."""

    backend: AttentionBackend
    min_work: int = 0


# TFLOP/s of FlashAttention-3 and of cuDNN on an H100, for head size 128 in bfloat16, by heads x tokens:
#   24 x 4,608: 683 and 622;  24 x 4,296: 633 and 540;  12 x 4,608: 569 and 543;  12 x 4,296: 534 and 453;
#   12 x 32,760: 669 and 572;  6 x 32,760: 685 and 566;  24 x 1,536: 201 and 409.
_HOPPER = (Row("flash_attn_3", 45_000), Row("cudnn"))

# Not measured. PyTorch's own kernels for these GPUs are an earlier version of FlashAttention-2.
_AMPERE_AND_ADA = (Row("flash_attn_2"),)

# Not measured. FlashAttention-4 was written for these GPUs.
_BLACKWELL = (Row("flash_attn_4"),)

TABLE: dict[Capability, tuple[Row, ...]] = {
    (8, 0): _AMPERE_AND_ADA,
    (8, 6): _AMPERE_AND_ADA,
    (8, 9): _AMPERE_AND_ADA,
    (9, 0): _HOPPER,
    (10, 0): _BLACKWELL,
    (10, 3): _BLACKWELL,
}
"""Rows by compute capability; the first row that applies is chosen."""


def has_backends(dtype: torch.dtype, head_size: int) -> bool:
    """Whether any backend other than PyTorch's own choice supports the dtype and the head size."""
    return dtype == torch.bfloat16 and head_size % 8 == 0 and head_size <= _MAX_HEAD_SIZE


def check_choice(choice: AttentionChoice, dtype: torch.dtype, head_sizes: Iterable[int]) -> None:
    """Check that a backend supports a model's dtype and head sizes. Raises InvalidInput."""
    if choice in ("auto", "sdpa"):
        return
    if dtype != torch.bfloat16:
        given = str(dtype).removeprefix("torch.")
        message = f"attention_backend: {choice} supports bfloat16, and dtype is {given}; use auto or sdpa"
        raise InvalidInput(message, field="attention_backend")
    if unfit := sorted({size for size in head_sizes if not has_backends(dtype, size)}):
        message = f"attention_backend: {choice} supports head sizes 8, 16, ... {_MAX_HEAD_SIZE}, and the model has"
        raise InvalidInput(f"{message} {', '.join(map(str, unfit))}; use auto or sdpa", field="attention_backend")


def choose_backend(
    capability: Capability,
    dtype: torch.dtype,
    work: int,
    keys: int,
    head_size: int,
    is_usable: Callable[[PackageName], bool],
    choice: AttentionChoice = "auto",
) -> AttentionBackend:
    """Choose the backend of attention without a mask. "sdpa" leaves the choice to PyTorch.

    A `choice` other than auto replaces the table. The result is "sdpa" for dtypes other than bfloat16, for head sizes
    above 128 or not divisible by 8, and for fewer keys than the backend supports: the text of an empty prompt can be a
    single token.
    """
    if not has_backends(dtype, head_size):
        return "sdpa"
    rows = TABLE.get(capability, ()) if choice == "auto" else (Row(choice),)
    for backend, min_work in rows:
        if work < min_work or keys < _MIN_KEYS.get(backend, 1):
            continue
        package = ATTENTION_PACKAGES.get(backend)
        if choice != "auto" or package is None or is_usable(package):
            return backend
    return "sdpa"
