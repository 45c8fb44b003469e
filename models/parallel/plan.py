"""How a DiT is sharded between the ranks of a worker group, as data that stands beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.layers.module_paths import matches


@dataclass(frozen=True)
class Cut:
    """An argument of one of the model's methods that each rank gets its chunk of, along `dim`.

    All that is cut of one stream has one length. An argument that is None: the stream has no tokens.
    """

    method: str
    argument: str
    stream: str
    dim: int = 1


@dataclass(frozen=True)
class Join:
    """A method of the model that returns a chunk of a stream, along `dim`, which is gathered.

    `result` names the chunk where the method returns a mapping; None: the method returns the chunk itself. Nothing is
    gathered of a stream without tokens, and the mapping may lack it.
    """

    method: str
    stream: str
    dim: int = 1
    result: str | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """How a DiT is sharded. Modules are shell patterns of their paths: `*` is any index, `[qkv]` one of the letters.

    `column` layers keep some of their outputs; `row` layers take some inputs; `gathered` layers compute some outputs
    and give all; `norms` (RMS) are over outputs of column layers. What is not named is whole on every rank. `minor` are
    the column and row layers that are small or run once a request, so that nothing is gained in float8. `segments`
    are those of a layer whose inputs or outputs have parts of different meaning, as ratios. `heads` are the modules
    that tensors of all heads pass through (OwnHeads). `attention` are the calls of attention among tokens that are cut,
    `sharded_keys` those of queries that every rank has whole to such tokens; `cuts` and `joins` are where that begins
    and ends.
    """

    column: tuple[str, ...]
    row: tuple[str, ...]
    minor: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    segments: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    attention: tuple[str, ...]
    sharded_keys: tuple[str, ...] = ()
    cuts: tuple[Cut, ...]
    joins: tuple[Join, ...]

    @property
    def block_linears(self) -> tuple[str, ...]:
        """The large linear layers, of the blocks' attention and feed-forwards, as patterns of their paths."""
        return tuple(pattern for pattern in (*self.column, *self.row) if pattern not in self.minor)

    def segments_of(self, path: str, size: int) -> tuple[int, ...]:
        """The segments of a module's dimension of this size. Raises ValueError where the ratios do not fit it."""
        ratios = next((ratios for pattern, ratios in self.segments.items() if matches(path, pattern)), (1,))
        unit, rest = divmod(size, sum(ratios))
        if rest:
            raise ValueError(f"{path}: {size} cannot be cut into segments of {ratios}")
        return tuple(unit * ratio for ratio in ratios)
