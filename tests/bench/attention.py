"""Attention backends by shape, on a GPU: what the table in models/layers/attention.py is made from.

Queries, keys and values are parts of one tensor, as the models make them, in bfloat16 with heads of 128 channels. A
backend that is not there, or does not take a shape, shows as "-".

Run it with: python tests/bench/attention.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from bench_device import milliseconds
from bench_report import print_machine, print_table, say
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from models.layers.attention import choose_backend, flash_attention_3, has_flash_attention_3

HEAD_SIZE = 128
# Where it comes from, heads, query tokens, key tokens.
SHAPES = (
    ("Flux 1024x1024", 24, 4608, 4608),
    ("Flux, 2 GPUs", 12, 4608, 4608),
    ("Flux 512x512", 24, 1536, 1536),
    ("Qwen-Image 1024x1024", 24, 4296, 4296),
    ("Qwen-Image, 2 GPUs", 12, 4296, 4296),
    ("Wan 1.3B 480x832x81", 12, 32760, 32760),
    ("Wan 1.3B, 2 GPUs", 6, 32760, 32760),
    ("Wan 1.3B, to the text", 12, 32760, 512),
)


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print_machine("Attention by backend and shape")
    capability = torch.cuda.get_device_capability()
    say(f"{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}")  # type: ignore[no-untyped-call]
    say()
    rows = []
    for name, heads, queries, keys in SHAPES:
        work = heads * min(queries, keys)
        chosen = choose_backend(capability, torch.bfloat16, work, HEAD_SIZE, has_flash_attention_3())
        rows.append((name, f"{heads} x {queries} x {keys}", *measure(heads, queries, keys), chosen))
    print_table(("TFLOP/s", "heads, queries, keys", "cuDNN", "SDPA flash", "FlashAttention-3", "the table's"), rows)


@torch.inference_mode()
def measure(heads: int, queries: int, keys: int) -> list[str]:
    """TFLOP/s of each backend."""
    q = torch.randn(1, queries, heads, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(1, keys, 2 * heads, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
    k, v = kv.chunk(2, dim=2)
    runs: list[Callable[[], Tensor]] = [
        lambda: _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v),
        lambda: _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v),
        lambda: flash_attention_3(q, k, v),
    ]
    flops = 4 * queries * keys * heads * HEAD_SIZE
    return [_speed(run, flops) for run in runs]


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def _speed(run: Callable[[], object], flops: int) -> str:
    try:
        run()
    except (RuntimeError, ImportError):
        return "-"
    return f"{flops / milliseconds(run, calls=10, rounds=3) / 1e9:.0f}"


if __name__ == "__main__":
    main()
