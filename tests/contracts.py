"""Contracts of workers of different releases, for tests of the compatibility of workers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from common.stage import Contract
from common.variants import unite_contracts
from common.wiring import Wiring
from fleet.v1 import worker_pb2
from services.worker_server import contract_message, variant_messages
from slot_claims import worker

SUPPLIED = {"canvas": "Canvas", "schedule": "Schedule"}
READ = {"latents": "Latents"}
WIRING = Wiring("", SUPPLIED, READ)


def contract(
    *,
    inputs: Mapping[str, str] | None = None,
    outputs: Mapping[str, str] | None = None,
    optional: Collection[str] = (),
) -> Contract:
    """A denoising contract; by default it has the inputs and outputs of WIRING."""
    read, written = SUPPLIED if inputs is None else inputs, READ if outputs is None else outputs
    return Contract("denoising", read, written, frozenset(optional))


NEEDING = contract(inputs={**SUPPLIED, "novelty": "Latents"})
"""The contract of a newer release, with an input that WIRING does not supply."""
FAULT = "input 'novelty': the worker requires Latents, the coordinator supplies none"
"""The reason why NEEDING does not fit WIRING."""


def worker_with(
    announced: Contract | Mapping[str, Contract], worker_id: str = "w", *, capacity: int = 1, numerics: str = ""
) -> worker_pb2.WorkerInfo:
    """A worker that announces one contract, like workers of release 0.1, or one contract per variant."""
    info = worker(worker_id, capacity=capacity, numerics=numerics)
    if isinstance(announced, Contract):
        info.contract.CopyFrom(contract_message(announced))
        return info
    info.contract.CopyFrom(contract_message(unite_contracts("denoising", list(announced.values()))))
    info.variant_contracts.extend(variant_messages(announced))
    return info
