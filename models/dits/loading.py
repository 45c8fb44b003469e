"""Loads the DiT of a checkpoint, or a rank's part of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, TypeVar

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

Transformer = TypeVar("Transformer", bound=DiffusionTransformer)


def load_transformer(
    build: Callable[[], Transformer],
    plan: ParallelPlan,
    checkpoint: Checkpoint,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    mesh: WorkerMesh | None,
    *,
    heads: int,
    feed_forward: int | None = None,
    keep_float32: Sequence[str] = (),
    unused: Sequence[str] = (),
    own_entries: Collection[str] = (),
) -> Transformer:
    """Build the DiT on the meta device, cut it to this rank's part, and read the weights of the module `name`.

    `heads` and `feed_forward` are the sizes that the degrees must divide; None: every degree divides the feed-forward
    layers. `own_entries` of config.json are read by ours, and not by Diffusers' class of the same name. Raises
    CheckpointError, and InvalidInput for a mesh whose degrees do not divide the model.
    """
    _warn_of_unknown_entries(checkpoint, name, own_entries)
    with torch.device("meta"):
        model = build()
    parallelize(model, plan, mesh, heads=heads, feed_forward=feed_forward)
    files = checkpoint.weight_files(name)
    load_module(model, name, files, device, dtype, keep_float32=keep_float32, unused=unused)
    model.block_linears = plan.block_linears
    return model


def _warn_of_unknown_entries(checkpoint: Checkpoint, name: str, own_entries: Collection[str]) -> None:
    """Log the entries of config.json that neither this Diffusers nor the DiT knows."""
    class_name = checkpoint.modules[name][1]
    if class_name not in dir(diffusers):
        return
    known = {*inspect.signature(getattr(diffusers, class_name)).parameters, *own_entries}
    entries = sorted(key for key in checkpoint.module_config(name) if key not in known and not key.startswith("_"))
    if entries:
        _log.warning("unknown config entries are ignored", module=name, entries=entries)
