"""The one entry point for attention. What runs behind it is chosen by a committed table, never by timing at run time.

So workers of one kind agree bit for bit. The table is measured by tests/bench/attention.py.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from models.layers.backend import is_installed

Backend = Literal["sdpa", "cudnn", "flash_attn_3"]

# Compute capability of Hopper, to the products of heads and tokens from which on FlashAttention-3 is faster than
# cuDNN there. Measured on an H100 at head size 128 in bfloat16: 24 x 4,608 and 24 x 4,296 (683 and 633 against 622 and
# 540 TFLOP/s), 12 x 4,608 and 12 x 4,296 (569 and 534 against 543 and 453), 12 x 32,760 and 6 x 32,760 (669 and 685
# against 572 and 566). Below, at 24 x 1,536, it is slower (201 against 409).
_FLASH_ATTENTION_3_FROM = {(9, 0): 45_000}

_QUERY_TILES = {128: 128}
"""How many queries FlashAttention-3's kernel takes at a time, by head size."""

_MOST_SPLITS, _TURNS_A_SPLIT, _LEAST_GAIN = 8, 0.02, 0.08
"""Of keys: parts at most, what merging one more costs in turns, and the share of turns that sharing out must save."""

_ATEN = torch.ops.aten

_CUDNN_CAPABILITIES = ((9, 0),)
_LARGEST_HEAD = 128


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Softmax attention without causality. q, k, v and the result are (batch, tokens, heads, head size).

    `mask` broadcasts to (batch, heads, query tokens, key tokens): True attends, or a float that is added to the scores.
    `out` is where the result is to be, which may be channels of a wider tensor.
    """
    backend = _backend_for(q, k, mask)
    # A compiler can trace what has a result, and not what writes into one.
    if backend == "flash_attn_3" and not torch.compiler.is_compiling():
        return flash_attention_3_into(q, k, v, torch.empty_like(q) if out is None else out)
    attended = _attended(q, k, v, mask, backend)
    return attended if out is None else out.copy_(attended)


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: Backend) -> Tensor:
    if backend == "flash_attn_3":
        result: Tensor = flash_attention_3(q, k, v)
        return result
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if backend == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """attention() over some of the keys, and what it takes to merge it with that over others.

    The second result is the logarithm of the sum of the exponentials of each query's scores, float32 (batch, tokens,
    heads). There must be at least one query and one key. The backend is the table's; where that leaves the choice to
    PyTorch, it is a kernel that tells the logarithm.
    """
    backend = _backend_for(q, k, None)
    if backend == "flash_attn_3":
        out, lse = flash_attention_3(q, k, v, return_attn_probs=True)
        return out, lse.transpose(1, 2)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if not q.is_cuda:
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif backend == "cudnn":
        out, lse = _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    else:
        out, lse = _ATEN._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    # cuDNN adds a dimension of 1, the efficient kernel rows up to a multiple of its tile.
    lse = lse.reshape(*lse.shape[:2], -1)[:, :, : q.shape[2]]
    return out.transpose(1, 2), lse.transpose(1, 2)


def _backend_for(q: Tensor, k: Tensor, mask: Tensor | None) -> Backend:
    if not q.is_cuda or mask is not None:
        return "sdpa"
    batch, tokens, heads, head_size = q.shape
    work = batch * heads * min(tokens, k.shape[1])
    return choose_backend(torch.cuda.get_device_capability(q.device), q.dtype, work, head_size, has_flash_attention_3())


def choose_backend(
    capability: tuple[int, int], dtype: torch.dtype, work: int, head_size: int, has_flash_attention_3: bool
) -> Backend:
    """What the table names for attention without a mask on a GPU; "sdpa" leaves the choice to PyTorch.

    `work` is the number of rows of scores, or of their columns where these are fewer: batch * heads * tokens.
    """
    if dtype != torch.bfloat16 or head_size % 8 or head_size > _LARGEST_HEAD:
        return "sdpa"
    least = _FLASH_ATTENTION_3_FROM.get(capability)
    if least is not None and work >= least and has_flash_attention_3:
        return "flash_attn_3"
    return "cudnn" if capability in _CUDNN_CAPABILITIES else "sdpa"


def has_flash_attention_3() -> bool:
    """Whether the package is installed. It is part of the numerics fingerprint: workers with and without it differ."""
    return is_installed("fa3_fwd_interface")


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor, **options: bool) -> Any:
    """attention() without a mask, by the kernels of FlashAttention-3. Raises ImportError where these are not there."""
    # An optional package for GPUs.
    import fa3_fwd_interface

    return fa3_fwd_interface.flash_attn_func(q, k, v, **options)


def flash_attention_3_into(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """The same into `out`, whose channels are adjacent, with heads shared out between calls."""
    # Loading it registers its operators: its own function has no such argument.
    import fa3_fwd_interface  # noqa: F401

    batch, tokens, heads, head_size = q.shape
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    tiles = batch * math.ceil(tokens / _QUERY_TILES[head_size]) if head_size in _QUERY_TILES else 0
    for share, splits in head_shares(tiles, heads, processors):
        parts = (each[:, :, share] for each in (q, k, v))
        torch.ops.fa3_fwd.fwd(*parts, out=out[:, :, share], num_splits=splits)
    return out


def head_shares(tiles: int, heads: int, processors: int) -> list[tuple[slice, int]]:
    """Which heads are attended to in one call, and into how many parts their keys are split meanwhile.

    A head has `tiles` tiles of queries, and as many tiles as there are processors are computed at a time. Where the
    last few would leave most of them idle, these tiles' heads get a call of their own, which splits the keys.
    """
    everything = [(slice(0, heads), 1)]
    full = processors * (tiles * heads // processors) // tiles if tiles else heads
    rest = heads - full
    if not 0 < full < heads:
        return everything

    def turns(splits: int) -> float:
        return math.ceil(tiles * rest * splits / processors) / splits

    splits = min(range(2, _MOST_SPLITS + 1), key=lambda each: turns(each) + _TURNS_A_SPLIT * each)
    before, after = math.ceil(tiles * heads / processors), math.ceil(tiles * full / processors) + turns(splits)
    if after > (1 - _LEAST_GAIN) * before:
        return everything
    return [(slice(0, full), 1), (slice(full, heads), splits)]


class KeyValues:
    """Keys and values (B, L, H, K) on their way to attention. A parallel form sends them to other ranks.

    `room` is where they are to be written before they are sent, if they are not to be sent from where they are: keys
    and values of each token behind each other, (B, L, 2, H, K).
    """

    room: Tensor | None = None

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def take(self, k: Tensor, v: Tensor) -> None:
        """Send these."""
        if self.room is not None:
            for room, tensor in zip(self.room.unbind(2), (k, v), strict=True):
                room.copy_(tensor)
        self.send()

    def send(self) -> None:
        """Begin to send them, once they are written. What is computed next overlaps with it."""

    def wait(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all ranks, once they are there."""
        return self.k, self.v


class Attention(nn.Module):
    """attention() as a module, so that a parallel form can take its place in a model.

    A parallel form sends tensors to other ranks: a model that has something else to compute meanwhile starts queries,
    keys and values as soon as they are made, and finishes later.
    """

    travels = False
    """Whether keys and values are sent anywhere, so that it pays to make them first."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, tokens, heads, head size) each."""
        sent = self.key_values(k, v)
        sent.take(k, v)
        return self.finish(self.start_queries(q), sent)

    def key_values(self, k: Tensor, v: Tensor) -> KeyValues:
        """A way for keys and values of these shapes, which may still have to be written."""
        return KeyValues(k, v)

    def new_key_values(self, like: Tensor, shape: tuple[int, ...]) -> KeyValues:
        """The same with room (B, L, 2, H, K) for some that are nowhere yet, in the type of `like`."""
        room = like.new_empty(shape)
        made = self.key_values(*room.unbind(2))
        made.room = room
        return made

    def start_queries(self, x: Tensor) -> Tensor:
        """Send queries on their way: only finish() can read what it returns."""
        return x

    def finish(self, q: Tensor, sent: KeyValues, out: Tensor | None = None) -> Tensor:
        """Attend to what was started; into `out`, if given."""
        return attention(q, *sent.wait(), out=out)
