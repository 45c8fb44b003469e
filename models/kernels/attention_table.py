"""The attention backend of each GPU and shape: a committed table, so that workers of one kind agree bit for bit.

tests/bench/attention.py measures it. `work` is batch x heads x tokens, of queries or keys, whichever are fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from common.errors import InvalidInput
from models.kernels.packages import ATTENTION_PACKAGES, AttentionBackend, AttentionChoice, Capability, PackageName

_LARGEST_HEAD = 128

_MIN_KEYS: dict[AttentionBackend, int] = {"cudnn": 2}
"""Fewest keys that a backend takes, where it does not take one."""


class Row(NamedTuple):
    """A backend, and the smallest work at which it is taken."""

    backend: AttentionBackend
    min_work: int = 0


# Measured on an H100 at head size 128 in bfloat16, FlashAttention-3 against cuDNN in TFLOP/s: 24 x 4,608 and 24 x 4,296
# (683 and 633 against 622 and 540), 12 x 4,608 and 12 x 4,296 (569 and 534 against 543 and 453), 12 x 32,760 and
# 6 x 32,760 (669 and 685 against 572 and 566). At 24 x 1,536 FlashAttention-3 is slower (201 against 409).
_HOPPER = (Row("flash_attn_3", 45_000), Row("cudnn"))

# Not measured: PyTorch has no other kernels for these GPUs than FlashAttention-2 of an earlier version.
_AMPERE_AND_ADA = (Row("flash_attn_2"),)

# Not measured: FlashAttention-4 is written for these GPUs.
_BLACKWELL = (Row("flash_attn_4"),)

TABLE: dict[Capability, tuple[Row, ...]] = {
    (8, 0): _AMPERE_AND_ADA,
    (8, 6): _AMPERE_AND_ADA,
    (8, 9): _AMPERE_AND_ADA,
    (9, 0): _HOPPER,
    (10, 0): _BLACKWELL,
    (10, 3): _BLACKWELL,
}
"""Rows by compute capability; the first one that applies is taken."""


def has_backends(dtype: torch.dtype, head_size: int) -> bool:
    """Whether there are backends beside PyTorch's own choice."""
    return dtype == torch.bfloat16 and head_size % 8 == 0 and head_size <= _LARGEST_HEAD


def check_choice(choice: AttentionChoice, dtype: torch.dtype, head_sizes: Iterable[int]) -> None:
    """Refuse a backend that does not take a model's dtype or one of its head sizes. Raises InvalidInput."""
    if choice in ("auto", "sdpa"):
        return
    if dtype != torch.bfloat16:
        given = str(dtype).removeprefix("torch.")
        message = f"attention_backend: {choice} takes bfloat16, and dtype is {given}; auto and sdpa work"
        raise InvalidInput(message, field="attention_backend")
    if unfit := sorted({size for size in head_sizes if not has_backends(dtype, size)}):
        message = f"attention_backend: {choice} takes heads of 8, 16, ... {_LARGEST_HEAD} channels, and the model has"
        raise InvalidInput(f"{message} {', '.join(map(str, unfit))}; auto and sdpa work", field="attention_backend")


def choose_backend(
    capability: Capability,
    dtype: torch.dtype,
    work: int,
    keys: int,
    head_size: int,
    is_usable: Callable[[PackageName], bool],
    choice: AttentionChoice = "auto",
) -> AttentionBackend:
    """The backend of attention without a mask; "sdpa" leaves the choice to PyTorch.

    A backend that a setting names takes the place of the table. Both are for bfloat16, heads of 8 to 128 channels
    and as many keys as the backend needs: an empty prompt can be one token.
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
