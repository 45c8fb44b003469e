"""How a DiT is sharded between the ranks of a worker group, as data that stands beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from models.layers.module_paths import matches

TokenSharding = Literal["sharded", "whole"]
"""Whether each rank of the sequence axes has a chunk of a token segment, or all of it."""


@dataclass(frozen=True)
class Cut:
    """An argument of one of the model's entry points of which each rank gets its chunk, along `dim`.

    All arguments of one segment have one length. An argument that is None: the segment has no tokens.
    """

    method: str
    argument: str
    segment: str
    dim: int = 1


@dataclass(frozen=True)
class Join:
    """An entry point of the model that returns a chunk of a segment, along `dim`, which is gathered.

    `result` names the chunk where the method returns a mapping; None: the method returns the chunk itself. Nothing is
    gathered of a segment without tokens, and the mapping may lack it.
    """

    method: str
    segment: str
    dim: int = 1
    result: str | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """How a DiT is sharded. Modules are shell patterns of their paths: `*` is any index, `[qkv]` one of the letters.

    `column` layers keep some of their outputs; `row` layers take some inputs; `gathered` layers compute some outputs
    and give all; `norms` (RMS) are over outputs of column layers. What is not named is whole on every rank. `minor` are
    the column and row layers that are small or run once a request, so that nothing is gained in float8. `parts` are
    those of a layer whose inputs or outputs have parts of different meaning, as ratios. `heads` are the modules that
    tensors of all heads pass through (OwnHeads).

    `token_segments` are the model's token segments (text, image, video ...). `attention` are the calls of attention
    among tokens that are sharded, `sharded_keys` those of queries that every rank has whole to such tokens; `cuts` and
    `joins` are where that begins and ends.

    Raises ValueError where a cut or a join is of a segment that is not sharded, where a sharded segment has no cut, and
    for a minor layer that is neither a column nor a row layer.
    """

    column: tuple[str, ...]
    row: tuple[str, ...]
    minor: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    token_segments: Mapping[str, TokenSharding]
    attention: tuple[str, ...]
    sharded_keys: tuple[str, ...] = ()
    cuts: tuple[Cut, ...]
    joins: tuple[Join, ...]

    def __post_init__(self) -> None:
        sharded = {name for name, sharding in self.token_segments.items() if sharding == "sharded"}
        cut, joined = {each.segment for each in self.cuts}, {each.segment for each in self.joins}
        if whole := sorted((cut | joined) - sharded):
            raise ValueError(f"token_segments: cuts or joins are of {whole}, which are not sharded")
        if uncut := sorted(sharded - cut):
            raise ValueError(f"token_segments: {uncut} are sharded, but no cut is of them")
        if unknown := sorted({*self.minor} - {*self.column, *self.row}):
            raise ValueError(f"minor: {unknown} are neither column nor row layers")

    @property
    def block_linears(self) -> tuple[str, ...]:
        """The large linear layers, of the blocks' attention and feed-forwards, as patterns of their paths."""
        return tuple(pattern for pattern in (*self.column, *self.row) if pattern not in self.minor)

    def parts_of(self, path: str, size: int) -> tuple[int, ...]:
        """The parts of a module's dimension of this size. Raises ValueError where the ratios do not fit it."""
        ratios = next((ratios for pattern, ratios in self.parts.items() if matches(path, pattern)), (1,))
        unit, rest = divmod(size, sum(ratios))
        if rest:
            raise ValueError(f"{path}: {size} cannot be cut into parts of {ratios}")
        return tuple(unit * ratio for ratio in ratios)
