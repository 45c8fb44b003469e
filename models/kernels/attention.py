"""Non-causal softmax attention, by the backend that the attention table or a setting chooses.

Shapes: q, k, v and results are (batch, tokens, heads, head size).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from models.kernels import attention_backends
from models.kernels.attention_table import choose_backend
from models.kernels.backends import Operation
from models.kernels.packages import AttentionBackend, chosen_attention, is_usable

_ATEN = torch.ops.aten

_PLAIN: Operation[Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]] = Operation("attention")
_WITH_LSE: Operation[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = Operation(
    "attention with log-sum-exp"
)
_MERGE: Operation[Callable[[tuple[Tensor, Tensor], tuple[Tensor, Tensor], torch.dtype], tuple[Tensor, Tensor]]] = (
    Operation("merge of attention")
)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Attention of all queries to all keys.

    `mask` broadcasts to (batch, heads, query tokens, key tokens). A bool mask is True where a query attends to a key; a
    float mask is added to the scores. The result is written to `out` if given, which may be channels of a wider tensor.
    """
    if mask is not None:
        return _placed(_scaled_dot_product(q, k, v, mask), out)
    return _PLAIN[_backend_for(q, k)](q, k, v, out)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """attention() and the log-sum-exp of each query's scores, float32 (batch, tokens, heads).

    Results for disjoint sets of keys can be merged by merge_attention(). Requires at least one query and one key. With
    the backend "sdpa", this function calls a PyTorch kernel that returns the log-sum-exp.
    """
    return _WITH_LSE[_backend_for(q, k)](q, k, v)


def merge_attention(
    one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Merge attention to two disjoint sets of keys. Arguments and result are (output, log-sum-exp) pairs.

    Computed in float32; the output (batch, tokens, heads, head size) is in `dtype`, the log-sum-exp (batch, tokens,
    heads) is float32.
    """
    return _MERGE.for_device_of(one[0])(one, other, dtype)


def _backend_for(q: Tensor, k: Tensor) -> AttentionBackend:
    if not q.is_cuda:
        return "sdpa"
    batch, tokens, heads, head_size = q.shape
    work = batch * heads * min(tokens, k.shape[1])
    capability = torch.cuda.get_device_capability(q.device)
    backend = choose_backend(capability, q.dtype, work, k.shape[1], head_size, is_usable, chosen_attention())
    # FlashAttention-4 compiles its kernels with CuTe DSL, which torch.compile cannot trace.
    return "sdpa" if backend == "flash_attn_4" and torch.compiler.is_compiling() else backend


def _placed(attended: Tensor, out: Tensor | None) -> Tensor:
    """The result, copied to `out` if given."""
    return attended if out is None else out.copy_(attended)


@_PLAIN.register("flash_attn_2")
def _by_flash_attention_2(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Tensor:
    return _placed(attention_backends.flash_attention_2(q, k, v), out)


@_PLAIN.register("flash_attn_3")
def _by_flash_attention_3(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Tensor:
    # torch.compile can trace the function that returns a tensor, but not the function that writes to an argument.
    if torch.compiler.is_compiling():
        return _placed(attention_backends.flash_attention_3(q, k, v), out)
    return attention_backends.flash_attention_3_into(q, k, v, torch.empty_like(q) if out is None else out)


@_PLAIN.register("flash_attn_4")
def _by_flash_attention_4(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Tensor:
    return _placed(attention_backends.flash_attention_4(q, k, v), out)


@_PLAIN.register("sdpa")
def _by_torch(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Tensor:
    return _placed(_scaled_dot_product(q, k, v, None), out)


@_PLAIN.register("cudnn")
def _by_cudnn(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _by_torch(q, k, v, out)


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _by_package_with_lse(
    run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Adapter that transposes a package's log-sum-exp (batch, heads, tokens) to (batch, tokens, heads)."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = run(q, k, v)
        return out, lse.transpose(1, 2)

    return attend


_WITH_LSE.register("flash_attn_2")(_by_package_with_lse(attention_backends.flash_attention_2_with_lse))
_WITH_LSE.register("flash_attn_3")(_by_package_with_lse(attention_backends.flash_attention_3_with_lse))
_WITH_LSE.register("flash_attn_4")(_by_package_with_lse(attention_backends.flash_attention_4_with_lse))


@_WITH_LSE.register("sdpa")
def _by_torch_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads = [each.transpose(1, 2) for each in (q, k, v)]
    if q.is_cuda:
        out, lse = _ATEN._scaled_dot_product_efficient_attention(*heads, None, True)[:2]
    else:
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(*heads)
    return out.transpose(1, 2), _lse_by_token(lse, q.shape[1])


@_WITH_LSE.register("cudnn")
def _by_cudnn_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _ATEN._scaled_dot_product_cudnn_attention(*(each.transpose(1, 2) for each in (q, k, v)), None, True)[:2]
    return out.transpose(1, 2), _lse_by_token(lse, q.shape[1])


def _lse_by_token(lse: Tensor, tokens: int) -> Tensor:
    """Log-sum-exp (batch, tokens, heads), without a kernel's padding of tokens and extra dimension."""
    return lse.reshape(*lse.shape[:2], -1)[:, :, :tokens].transpose(1, 2)


@_MERGE.register("torch")
def _merge_by_torch(
    one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(one[1], other[1])
    parts = [out.float() * (lse - total).exp()[..., None] for out, lse in (one, other)]
    return (parts[0] + parts[1]).to(dtype), total


@_MERGE.register("triton")
def _merge_by_triton(
    one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # An optional package for GPUs.
    from models.kernels import triton_kernels

    return triton_kernels.merge_attention(one, other, dtype)
