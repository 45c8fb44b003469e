"""Loads the DiT of a checkpoint, or one rank's shard of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import diffusers
import torch

from common.logs import get_logger
from models.dits.base import DiffusionTransformer
from models.parallel.parallelize import parallelize
from models.weights import load_module

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from models.parallel.mesh import WorkerMesh
    from models.parallel.plan import ParallelPlan

_log = get_logger(__name__)


class TransformerConfig(Protocol):
    """Architecture of a DiT, read from config.json."""

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Read config.json of the module. Raises CheckpointError."""


Config = TypeVar("Config", bound=TransformerConfig)
Transformer = TypeVar("Transformer", bound=DiffusionTransformer)


@dataclass(frozen=True, kw_only=True)
class TransformerLoader(Generic[Config, Transformer]):
    """Loader of one DiT class, as named in PipelineConfig.module_loaders.

    `build` makes the DiT from its config. `heads` and `feed_forward` return the number of attention heads and the width
    of the feed-forward layers, which the parallel degrees must divide; `feed_forward` None: the width is a multiple of
    the number of heads. `keep_float32` are substrings of the names of parameters that stay in float32. `unused` are
    substrings of the names of checkpoint weights that no module reads. `own_entries` are entries of config.json that
    the DiT reads, but Diffusers' class of the same name does not.
    """

    config: type[Config]
    build: Callable[[Config], Transformer]
    plan: ParallelPlan
    heads: Callable[[Config], int]
    feed_forward: Callable[[Config], int] | None = None
    keep_float32: Sequence[str] = ()
    unused: Sequence[str] = ()
    own_entries: Collection[str] = ()

    def __call__(
        self,
        checkpoint: Checkpoint,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        mesh: WorkerMesh | None = None,
    ) -> Transformer:
        """Build the DiT on the meta device, shard it for this rank, and read the weights of the module `name`.

        Raises CheckpointError, and InvalidInput for a mesh whose degrees do not divide `heads` or `feed_forward`.
        """
        config = self.config.from_dict(name, checkpoint.module_config(name))
        _warn_of_unknown_entries(checkpoint, name, self.own_entries)
        with torch.device("meta"):
            model = self.build(config)
        feed_forward = None if self.feed_forward is None else self.feed_forward(config)
        parallelize(model, self.plan, mesh, heads=self.heads(config), feed_forward=feed_forward)
        files = checkpoint.weight_files(name)
        load_module(model, name, files, device, dtype, keep_float32=self.keep_float32, unused=self.unused)
        model.block_linears = self.plan.block_linears
        return model


def _warn_of_unknown_entries(checkpoint: Checkpoint, name: str, own_entries: Collection[str]) -> None:
    """Log the entries of config.json that neither the installed Diffusers nor the DiT reads."""
    class_name = checkpoint.modules[name][1]
    if class_name not in dir(diffusers):
        return
    known = {*inspect.signature(getattr(diffusers, class_name)).parameters, *own_entries}
    entries = sorted(key for key in checkpoint.module_config(name) if key not in known and not key.startswith("_"))
    if entries:
        _log.warning("unknown config entries are ignored", module=name, entries=entries)
