"""QuACK implementation of models.kernels.quack_gemm: epilogues and tile shapes.

The tile shapes are the fastest measured shapes on an H100. With ping-pong scheduling, the epilogue of one warpgroup
overlaps with the main loop of the other warpgroup: an epilogue shorter than a tile's main loop takes no extra time.
"""

from __future__ import annotations

from typing import Any

from quack.activation import gelu_tanh_approx
from quack.epilogue.frontend import gemm_epilogue, pack, unpack
from quack.epilogue.head_rmsnorm import HeadRstd
from quack.epilogue.ops import RowVecLoad
from quack.epilogue.rotary import rotary_cos_sin_load
from torch import Tensor

from models.kernels.gemm_support import HEAD_EPS, HEAD_SIZE

WIDE = {"tile_M": 128, "tile_N": 192, "cluster_M": 2, "cluster_N": 1}
"""Tile shape for N divisible by 192."""

TALL = {"tile_M": 192, "tile_N": 128, "cluster_M": 1, "cluster_N": 2}
"""Tile shape for all other N, and for epilogues over whole heads of 128 channels."""


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def _gelu(acc: Any, bias: Any) -> dict[str, Any]:
    return {"D": gelu_tanh_approx(acc + bias)}


@gemm_epilogue(ops={"bias": RowVecLoad("bias"), "gate": RowVecLoad("gate")})
def _gated(acc: Any, c: Any, bias: Any, gate: Any) -> dict[str, Any]:
    return {"D": c + gate * (acc + bias)}


def _squares(acc: Any, bias: Any) -> dict[str, Any]:
    biased = acc + bias
    return {"inverse": biased * biased}


@gemm_epilogue(
    ops={
        "angles": rotary_cos_sin_load("angles", tma=True),
        "inverse": HeadRstd("inverse", eps=HEAD_EPS),
        "scale": RowVecLoad("scale"),
        "bias": RowVecLoad("bias"),
    },
    prepass=_squares,
    prepass_outs=("inverse",),
    mode="acc_pair",
)
def _normed_heads(acc: Any, angles: Any, inverse: Any, scale: Any, bias: Any) -> dict[str, Any]:
    even, odd = unpack((acc + bias) * inverse * scale)
    cos, sin = unpack(angles)
    return {"D": pack(even * cos - odd * sin, even * sin + odd * cos)}


def gelu_into(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """See models.kernels.quack_gemm.gelu_into."""
    _multiply(_gelu, x, weight, out, _tiles(weight), bias=_row(bias))


def add_gated(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, onto: Tensor) -> None:
    """See models.kernels.quack_gemm.add_gated."""
    _multiply(_gated, x, weight, onto, _tiles(weight), added=onto, bias=_row(bias), gate=_row(gate))


def normed_heads_into(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, angles: Tensor, out: Tensor) -> None:
    """See models.kernels.quack_gemm.normed_heads_into."""
    vectors: dict[str, Any] = {"bias": _row(bias), "scale": _row(scale)}
    _multiply(_normed_heads, x, weight, out, TALL, angles=angles, inverse=HEAD_SIZE, **vectors)


def _multiply(
    epilogue: Any,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    tiles: dict[str, int],
    *,
    added: Tensor | None = None,
    **epilogue_arguments: Any,
) -> None:
    epilogue.gemm(
        x,
        weight,
        out,
        added,
        epi_args=epilogue_arguments,
        **tiles,
        pingpong=True,
        persistent=True,
        is_dynamic_persistent=False,
        max_swizzle_size=8,
        # Programmatic dependent launch would start this kernel before the previous kernel has written its operands.
        post_init_attrs=(("use_pdl", False),),
    )


def _tiles(weight: Tensor) -> dict[str, int]:
    return WIDE if len(weight) % WIDE["tile_N"] == 0 else TALL


def _row(vector: Tensor) -> Tensor:
    """Vector (N,) as (1, N): QuACK's epilogue vectors have a batch dimension."""
    return vector.detach()[None]
