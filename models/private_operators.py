"""Undocumented PyTorch operators of GEMMs and worker groups, with the arguments passed."""

from __future__ import annotations

from dataclasses import dataclass

from common.package_guard import Attributes, Called, Missing, PrivateApi, find


@dataclass(frozen=True)
class Operator:
    """An overload under torch.ops, such as "aten._scaled_mm.out".

    `arguments` are its leading arguments, in order. `keywords` are further arguments, in any order.
    """

    name: str
    arguments: tuple[str, ...]
    keywords: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise Missing if the operator does not exist or its arguments differ."""
        overload = find(f"torch:ops.{self.name}")
        names = tuple(each.name for each in overload._schema.arguments)
        if names[: len(self.arguments)] != self.arguments or not set(self.keywords).issubset(names):
            raise Missing(f"torch.ops.{self.name}, which has other arguments ({', '.join(names)})")


_SPLITS = ("input", "output_split_sizes", "input_split_sizes", "group_name")
_HEADS = ("query", "key", "value")

GEMM = PrivateApi(
    "torch",
    "a linear layer",
    (
        Operator(
            "aten._scaled_mm.out",
            ("self", "mat2", "scale_a", "scale_b"),
            ("bias", "out_dtype", "use_fast_accum", "out"),
        ),
        Operator("aten._addmm_activation.out", ("self", "mat1", "mat2"), ("use_gelu", "out")),
    ),
)
"""Operators called by models.kernels.float8 and models.kernels.gemm."""

COLLECTIVES = PrivateApi(
    "torch",
    "a worker group",
    (
        Operator("_c10d_functional.wait_tensor.default", ("tensor",)),
        Operator("_c10d_functional.all_reduce.default", ("input", "reduce_op", "group_name")),
        Operator("_c10d_functional.all_reduce_.default", ("input", "reduce_op", "group_name")),
        Operator("_c10d_functional.all_gather_into_tensor.default", ("input", "group_size", "group_name")),
        Operator("_c10d_functional.all_to_all_single.default", _SPLITS),
        Called("torch.distributed._symmetric_memory:empty", 1, ("dtype", "device")),
        Called("torch.distributed._symmetric_memory:rendezvous", 2),
        Attributes("torch._C._distributed_c10d:_SymmetricMemory", ("barrier", "buffer_ptrs")),
        Operator("aten._scaled_dot_product_flash_attention_for_cpu.default", _HEADS),
        Operator("aten._scaled_dot_product_efficient_attention.default", (*_HEADS, "attn_bias", "compute_log_sumexp")),
        Operator("aten._scaled_dot_product_cudnn_attention.default", (*_HEADS, "attn_bias", "compute_log_sumexp")),
    ),
)
"""Operators of collectives, of peer memory, and of attention with log-sum-exp.

models.parallel.collectives, models.parallel.peer_memory and models.kernels.attention call them. Ring attention and
attention to sharded keys need the log-sum-exp of the scores.
"""
