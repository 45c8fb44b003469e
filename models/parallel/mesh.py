"""Device mesh of a worker group: its ranks in a grid of four axes.

One DiT runs on tp x ulysses x ring x cfg ranks, with one process and one device each. `tp` shards the weights,
`ulysses` and `ring` (together `sp`) shard the token sequence, and `cfg` distributes the branches of classifier-free
guidance. The axes from the innermost to the outermost are tp, ulysses, ring and cfg. tp communicates most: the ranks of
a tp group have consecutive numbers, so that a launcher that fills nodes in order of rank places them on one node, where
NVLink connects the GPUs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from common.errors import InvalidInput
from models.kernels.packages import is_usable

AxisName = Literal["cfg", "ring", "ulysses", "tp"]

AXES: tuple[AxisName, ...] = get_args(AxisName)
"""Axes from the outermost to the innermost: consecutive ranks differ in the last axis."""


@dataclass(frozen=True)
class Degrees:
    """Number of ranks along each axis. Raises InvalidInput for a degree below 1."""

    tp: int = 1
    ulysses: int = 1
    ring: int = 1
    cfg: int = 1

    def __post_init__(self) -> None:
        for axis in fields(self):
            degree = self.of(axis.name)
            if degree < 1:
                raise InvalidInput(f"{axis.name}: {degree} is not at least 1; 1 works", field=axis.name)

    def of(self, axis: str) -> int:
        """The degree of one axis."""
        degrees = {"tp": self.tp, "ulysses": self.ulysses, "ring": self.ring, "cfg": self.cfg}
        return degrees[axis]

    @property
    def sp(self) -> int:
        """Number of shards of the token sequence."""
        return self.ulysses * self.ring

    @property
    def world_size(self) -> int:
        """Number of ranks of the worker group."""
        return math.prod(self.of(axis) for axis in AXES)

    def check_model(self, heads: int, feed_forward: int | None = None) -> None:
        """Check that the degrees divide the number of attention heads and the feed-forward width.

        `feed_forward` None: the width is a multiple of `heads`. Raises InvalidInput, whose message lists the divisors.
        """
        if heads % (self.tp * self.ulysses):
            raise InvalidInput(
                f"tp x ulysses: {self.tp} x {self.ulysses} is not a divisor of the model's {heads} attention heads; "
                f"possible products: {_divisors(heads)}. ring has no such bound",
                field="tp" if heads % self.tp else "ulysses",
            )
        if feed_forward is not None and feed_forward % self.tp:
            possible = _divisors(math.gcd(heads, feed_forward))
            message = f"tp: {self.tp} is not a divisor of the model's feed-forward width {feed_forward}"
            raise InvalidInput(f"{message}; possible degrees: {possible}", field="tp")

    def __str__(self) -> str:
        return " ".join(f"{axis}={self.of(axis)}" for axis in reversed(AXES))


@dataclass(frozen=True)
class Axis:
    """One mesh axis from the view of one rank: number of ranks, own index, and name of the process group.

    Functional collectives take the name, which is empty for an axis with one rank.
    """

    size: int = 1
    index: int = 0
    group: str = ""


class WorkerMesh:
    """The mesh from the view of one rank.

    `device` is this rank's device. `shares_memory`: all ranks' GPUs can write to each other's memory.
    """

    def __init__(
        self,
        degrees: Degrees,
        device: torch.device,
        rank: int,
        axes: Mapping[AxisName, Axis],
        *,
        shares_memory: bool = False,
    ) -> None:
        self.degrees = degrees
        self.device = device
        self.rank = rank
        self.shares_memory = shares_memory
        self._axes = dict(axes)

    def axis(self, name: AxisName) -> Axis:
        """This rank's view of an axis."""
        return self._axes[name]

    def size(self, name: AxisName) -> int:
        """The number of ranks on an axis."""
        return self._axes[name].size

    def index(self, name: AxisName) -> int:
        """This rank's index on an axis, from 0."""
        return self._axes[name].index

    @property
    def sp_index(self) -> int:
        """Index of this rank's shard of the sequence. The shards of a ulysses group are adjacent."""
        return self.index("ring") * self.size("ulysses") + self.index("ulysses")


def get_sp_world_size(mesh: WorkerMesh | None) -> int:
    """Number of shards of the token sequence: ulysses x ring; 1 without a mesh."""
    return 1 if mesh is None else mesh.degrees.sp


def make_mesh(degrees: Degrees, device: torch.device, *, one_host: bool = False) -> WorkerMesh:
    """Create this rank's view of the mesh. A collective call: all ranks must make it.

    More than one rank requires an initialized torch.distributed (gloo for CPUs, NCCL for GPUs). `one_host`: all ranks
    are on one host, and rank i uses GPU i. Raises InvalidInput where the world size is not the product of the degrees.
    """
    if degrees.world_size == 1:
        return WorkerMesh(degrees, device, 0, {axis: Axis() for axis in AXES})
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    if ranks != degrees.world_size:
        message = f"{degrees} requires {degrees.world_size} ranks, but the worker group has {ranks}"
        raise InvalidInput(f"{message}; start as many ranks as the product of the degrees")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # No process group for axes with one rank: each group costs connections between all ranks.
    parallel = tuple(axis for axis in AXES if degrees.of(axis) > 1)
    grid = init_device_mesh(device.type, tuple(map(degrees.of, parallel)), mesh_dim_names=parallel)
    axes = {axis: Axis() for axis in AXES}
    for axis in parallel:
        axes[axis] = Axis(degrees.of(axis), grid.get_local_rank(axis), grid.get_group(axis).group_name)
    return WorkerMesh(
        degrees, device, distributed.get_rank(), axes, shares_memory=one_host and _have_peer_access(device, ranks)
    )


def _have_peer_access(device: torch.device, ranks: int) -> bool:
    """Whether GPUs 0 to ranks - 1 can write to each other's memory, and cuda-bindings is usable."""
    if device.type != "cuda" or torch.cuda.device_count() < ranks or not is_usable("cuda-bindings"):
        return False
    return all(torch.cuda.can_device_access_peer(*pair) for pair in itertools.permutations(range(ranks), 2))


def _divisors(number: int) -> str:
    return ", ".join(str(part) for part in range(1, number + 1) if number % part == 0)
