"""The ranks of a worker group, in a grid of four axes: what each layer must know to work with its neighbours.

One DiT is computed by `tp` x `ulysses` x `ring` x `cfg` ranks, one process and one device each. `tp` cuts the weights,
`ulysses` and `ring` (together `sp`) cut the sequence of tokens, `cfg` shares out the branches of classifier-free
guidance. Ranks that are neighbours on the tp axis talk most and get consecutive numbers, so that a launcher that fills
one node after the other puts them on one node's NVLink; then come ulysses, ring and cfg.
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
"""From the outermost to the innermost: consecutive ranks differ on the last."""


@dataclass(frozen=True)
class Degrees:
    """How many ranks share the work of one DiT along each axis. Raises InvalidInput for numbers that cannot be."""

    tp: int = 1
    ulysses: int = 1
    ring: int = 1
    cfg: int = 1

    def __post_init__(self) -> None:
        for axis in fields(self):
            degree = self.of(axis.name)
            if degree < 1:
                raise InvalidInput(f"{axis.name} is {degree}; it must be at least 1", field=axis.name)

    def of(self, axis: str) -> int:
        """The degree of one axis."""
        degrees = {"tp": self.tp, "ulysses": self.ulysses, "ring": self.ring, "cfg": self.cfg}
        return degrees[axis]

    @property
    def sp(self) -> int:
        """Into how many shards the sequence is cut."""
        return self.ulysses * self.ring

    @property
    def world_size(self) -> int:
        """Ranks of the worker group."""
        return math.prod(self.of(axis) for axis in AXES)

    def check_model(self, heads: int, feed_forward: int | None = None) -> None:
        """Refuse degrees that do not divide the model's attention heads and the width of its feed-forward layers.

        Raises InvalidInput, which says which degrees would divide them. `feed_forward` None: a multiple of heads.
        """
        if heads % (self.tp * self.ulysses):
            raise InvalidInput(
                f"tp x ulysses is {self.tp} x {self.ulysses}, but the model has {heads} attention heads; the product "
                f"must be one of {_divisors(heads)}. ring has no such bound",
                field="tp" if heads % self.tp else "ulysses",
            )
        if feed_forward is not None and feed_forward % self.tp:
            possible = _divisors(math.gcd(heads, feed_forward))
            message = f"tp is {self.tp}, but the model's feed-forward layers are {feed_forward} wide; it must be one of"
            raise InvalidInput(f"{message} {possible}", field="tp")

    def __str__(self) -> str:
        return " ".join(f"{axis}={self.of(axis)}" for axis in reversed(AXES))


@dataclass(frozen=True)
class Axis:
    """One axis, as one rank sees it: how many ranks are on it, which of them this one is, and their group's name.

    The name is what functional collectives take; an axis with one rank has none.
    """

    size: int = 1
    index: int = 0
    group: str = ""


class WorkerMesh:
    """What one rank knows of its worker group.

    `device` is where this rank computes; `shares_memory` says whether all ranks' devices can write to each other's.
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
        """This rank's neighbours on an axis."""
        return self._axes[name]

    def size(self, name: AxisName) -> int:
        """The number of ranks on an axis."""
        return self._axes[name].size

    def index(self, name: AxisName) -> int:
        """This rank's place on an axis, from 0."""
        return self._axes[name].index

    @property
    def sp_index(self) -> int:
        """Which shard of the sequence this rank holds: those of one ulysses group lie behind each other."""
        return self.index("ring") * self.size("ulysses") + self.index("ulysses")


def get_sp_world_size(mesh: WorkerMesh | None) -> int:
    """Into how many shards the sequence is cut: ulysses x ring, and 1 without a mesh."""
    return 1 if mesh is None else mesh.degrees.sp


def make_mesh(degrees: Degrees, device: torch.device, *, one_host: bool = False) -> WorkerMesh:
    """This rank's view of the worker group. All ranks must call it together.

    More than one rank needs torch.distributed, with gloo for CPUs or NCCL for GPUs, and exactly as many ranks as the
    degrees multiply to; anything else raises InvalidInput. One rank needs nothing. `one_host`: the ranks are on one
    machine, and each has its GPU of the same number.
    """
    if degrees.world_size == 1:
        return WorkerMesh(degrees, device, 0, {axis: Axis() for axis in AXES})
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    if ranks != degrees.world_size:
        raise InvalidInput(f"{degrees} takes {degrees.world_size} ranks, but the worker group has {ranks}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # An axis with one rank needs no group: each costs a connection between all ranks.
    shared = tuple(axis for axis in AXES if degrees.of(axis) > 1)
    grid = init_device_mesh(device.type, tuple(map(degrees.of, shared)), mesh_dim_names=shared)
    axes = {axis: Axis() for axis in AXES}
    for axis in shared:
        axes[axis] = Axis(degrees.of(axis), grid.get_local_rank(axis), grid.get_group(axis).group_name)
    return WorkerMesh(
        degrees, device, distributed.get_rank(), axes, shares_memory=one_host and _reach_each_other(device, ranks)
    )


def _reach_each_other(device: torch.device, ranks: int) -> bool:
    """Whether the first GPUs of this host, one for each rank, can write to each other's memory."""
    if device.type != "cuda" or torch.cuda.device_count() < ranks or not is_usable("cuda-bindings"):
        return False
    return all(torch.cuda.can_device_access_peer(*pair) for pair in itertools.permutations(range(ranks), 2))


def _divisors(number: int) -> str:
    return ", ".join(str(part) for part in range(1, number + 1) if number % part == 0)
