"""Parallel plans: the sharding of a DiT between the ranks of a worker group, as data beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from models.layers.module_paths import matches

TokenSharding = Literal["sharded", "replicated"]
"""Whether each rank of the sequence axes holds a chunk of a token segment, or the whole segment."""


@dataclass(frozen=True)
class ShardedArgument:
    """An argument of an entry point that is sharded along dimension `dim`: each rank receives its chunk.

    All arguments of one segment have the same length. An argument that is None means that the segment has no tokens.
    """

    method: str
    argument: str
    segment: str
    dim: int = 1


@dataclass(frozen=True)
class GatheredResult:
    """A result of an entry point that is gathered along `dim`: each rank returns its chunk of a segment.

    `result` is the chunk's key where the method returns a mapping; None: the method returns the chunk itself. A segment
    without tokens is not gathered, and its key may be missing.
    """

    method: str
    segment: str
    dim: int = 1
    result: str | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """Sharding of a DiT. Modules are named by patterns of their paths, as in models.layers.module_paths.

    Tensor parallelism: `column` layers shard their outputs and `row` layers their inputs. `gathered` layers shard their
    outputs and all-gather them. `norms` are RMS norms over the outputs of column layers. `select_heads` are the
    SelectHeads modules. All other modules are replicated. `parts` are the sizes, as ratios, of the parts of a layer's
    sharded dimension, where the parts have different meanings. `unquantized` are column and row layers that
    `block_linears` excludes: float8 does not pay off for small layers and for layers that run once per request.

    Sequence parallelism: `token_segments` are the model's token segments (text, image, video ...). `attention` are the
    Attention modules in which sharded tokens attend to each other; `sharded_keys` are Attention modules in which
    replicated queries attend to sharded keys. `sharded_arguments` begin the sharded region of the model, and
    `gathered_results` end it.

    Raises ValueError if an argument or a result belongs to a segment that is not sharded, if a sharded segment has no
    argument, and for an `unquantized` layer that is neither a column nor a row layer.
    """

    column: tuple[str, ...]
    row: tuple[str, ...]
    unquantized: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    select_heads: tuple[str, ...] = ()
    token_segments: Mapping[str, TokenSharding]
    attention: tuple[str, ...]
    sharded_keys: tuple[str, ...] = ()
    sharded_arguments: tuple[ShardedArgument, ...]
    gathered_results: tuple[GatheredResult, ...]

    def __post_init__(self) -> None:
        sharded = {name for name, sharding in self.token_segments.items() if sharding == "sharded"}
        begun = {each.segment for each in self.sharded_arguments}
        ended = {each.segment for each in self.gathered_results}
        if unsharded := sorted((begun | ended) - sharded):
            message = f"token_segments: {unsharded} are not sharded, but their arguments or results are"
            raise ValueError(f"{message}; mark them as sharded")
        if missing := sorted(sharded - begun):
            raise ValueError(f"token_segments: {missing} are sharded, but not in sharded_arguments; add one entry each")
        if unknown := sorted({*self.unquantized} - {*self.column, *self.row}):
            raise ValueError(f"unquantized: {unknown} are neither column nor row layers; name column or row layers")

    @property
    def block_linears(self) -> tuple[str, ...]:
        """Path patterns of the large linear layers in the blocks' attention and feed-forwards."""
        return tuple(pattern for pattern in (*self.column, *self.row) if pattern not in self.unquantized)

    def parts_of(self, path: str, size: int) -> tuple[int, ...]:
        """Sizes of the parts of a module's dimension `size`. Raises ValueError where the ratios do not divide it."""
        ratios = next((ratios for pattern, ratios in self.parts.items() if matches(path, pattern)), (1,))
        unit, rest = divmod(size, sum(ratios))
        if rest:
            raise ValueError(f"{path}: size {size} is not a multiple of {sum(ratios)}, the sum of the ratios {ratios}")
        return tuple(unit * ratio for ratio in ratios)
