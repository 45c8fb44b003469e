"""Compares, between ranks, the facts that determine the bytes of a result, before weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.errors import FailedPrecondition
from models.kernels.backends import facts as kernel_facts
from models.loader import numerics_fingerprint
from services.denoising.messages import Kind, Link
from services.denoising.settings import DenoisingSettings
from services.worker_settings import dtype_of

_MOST_NAMED = 4
"""Maximum number of facts of a rank in an error message."""


def facts_of(settings: DenoisingSettings, device: torch.device) -> list[str]:
    """Facts of this rank: kernel packages, torch, device, numerics fingerprint. Call it after the kernel trials."""
    dtype = dtype_of(settings.dtype, device)
    fingerprint = numerics_fingerprint(
        device, dtype, settings.degrees, settings.approximation, plugins=settings.plugins
    )
    if device.type != "cuda":
        return [f"torch {torch.__version__}", f"numerics {fingerprint}"]
    name = torch.cuda.get_device_name(device)
    return [*kernel_facts(), f"torch {torch.__version__}", f"device {name}", f"numerics {fingerprint}"]


def compare_facts(links: Sequence[Link], facts: Sequence[str], seconds: float) -> None:
    """Exchange facts with every peer. All ranks call it.

    Raises FailedPrecondition for different facts, OutOfStep if a peer exits or sends no facts within `seconds`.
    """
    for link in links:
        link.send(Kind.FACTS, "\n".join(facts).encode())
    for link in links:
        _, payload = link.receive(Kind.FACTS, seconds=seconds)
        theirs = payload.decode(errors="backslashreplace").split("\n")
        if theirs != list(facts):
            raise FailedPrecondition(
                f"ranks: rank {link.peer} has {_without(theirs, facts)} and this rank has {_without(facts, theirs)}; "
                "use the same GPUs, packages and release on all hosts, or name the kernel packages in kernels"
            )


def _without(facts: Sequence[str], others: Sequence[str]) -> str:
    """The facts that are not in `others`, on one line."""
    return ", ".join([fact for fact in facts if fact not in others][:_MOST_NAMED]) or "nothing else"
