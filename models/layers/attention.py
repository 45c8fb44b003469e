"""The one entry point for attention. A committed table chooses the backend, never timing at run time.

So workers of one kind agree bit for bit. See models.kernels.attention_table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from models.kernels import attention_backends as backends
from models.kernels.attention_table import choose_backend
from models.kernels.packages import AttentionBackend, chosen_attention, is_usable

_ATEN = torch.ops.aten

_BY_PACKAGE: dict[AttentionBackend, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flash_attn_2": backends.flash_attention_2,
    "flash_attn_3": backends.flash_attention_3,
    "flash_attn_4": backends.flash_attention_4,
}

_BY_PACKAGE_WITH_LSE: dict[AttentionBackend, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "flash_attn_2": backends.flash_attention_2_with_lse,
    "flash_attn_3": backends.flash_attention_3_with_lse,
    "flash_attn_4": backends.flash_attention_4_with_lse,
}


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Softmax attention without causality. q, k, v and the result are (batch, tokens, heads, head size).

    `mask` broadcasts to (batch, heads, query tokens, key tokens): True attends, or a float that is added to the scores.
    `out` receives the result, and may be channels of a wider tensor.
    """
    backend = _backend_for(q, k, mask)
    # A compiler can trace what has a result, and not what writes into one.
    if backend == "flash_attn_3" and not torch.compiler.is_compiling():
        return backends.flash_attention_3_into(q, k, v, torch.empty_like(q) if out is None else out)
    attended = _attended(q, k, v, mask, backend)
    return attended if out is None else out.copy_(attended)


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: AttentionBackend) -> Tensor:
    if (by_package := _BY_PACKAGE.get(backend)) is not None:
        return by_package(q, k, v)
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if backend == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """attention() over some of the keys, with the log-sum-exp that merges it with attention over the others.

    The second result is the logarithm of the sum of the exponentials of each query's scores, float32 (batch, tokens,
    heads). There must be at least one query and one key. The table chooses the backend; where it leaves the choice to
    PyTorch, a kernel that returns the log-sum-exp is taken.
    """
    backend = _backend_for(q, k, None)
    if (by_package := _BY_PACKAGE_WITH_LSE.get(backend)) is not None:
        out, lse = by_package(q, k, v)
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


def _backend_for(q: Tensor, k: Tensor, mask: Tensor | None) -> AttentionBackend:
    if not q.is_cuda or mask is not None:
        return "sdpa"
    batch, tokens, heads, head_size = q.shape
    work = batch * heads * min(tokens, k.shape[1])
    capability = torch.cuda.get_device_capability(q.device)
    backend = choose_backend(capability, q.dtype, work, k.shape[1], head_size, is_usable, chosen_attention())
    # Its kernels are made by a compiler of its own, which torch.compile cannot trace.
    return "sdpa" if backend == "flash_attn_4" and torch.compiler.is_compiling() else backend


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of earlier tokens, to which those of the current tokens are added in place.

    `slab` is (2, B, capacity, H, K): keys, then values. `slots` are where the current tokens go, in their order, and
    `length` is the number of tokens that are valid then, from the first on. Keys have no order in attention: a slot may
    be that of a token that left the window.
    """

    slab: Tensor
    slots: tuple[slice, ...]
    length: int

    def extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, tokens, H, K) to the slots; all valid ones (B, length, H, K), in the slab."""
        keys, values = self.slab.unbind()
        begin = 0
        for slot in self.slots:
            end = begin + slot.stop - slot.start
            keys[:, slot].copy_(k[:, begin:end])
            values[:, slot].copy_(v[:, begin:end])
            begin = end
        return keys[:, : self.length], values[:, : self.length]


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

    def cached_heads(self, heads: int) -> int:
        """Of `heads` heads of this rank, those whose keys and values a cache on this rank holds."""
        return heads

    def finish(
        self, q: Tensor, sent: KeyValues, out: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Attend to what was started, and to the tokens in the cache; into `out`, if given."""
        keys, values = sent.wait()
        if cache is not None:
            keys, values = cache.extended(keys, values)
        return attention(q, keys, values, out=out)
