"""Compatibility of coordinators and workers of different releases, by their contracts and wirings.

A wiring lists the slots that a coordinator supplies to a service and reads from it. Each worker announces its contract,
and each claim has the wiring of its request. The store compares them before it grants a claim;
common/state/lua/contracts.lua implements the same rule. The coordinator compares again, because processes of the
previous release grant claims without this comparison.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from common.pipeline import ServiceSpec, result_of
from common.stage import Contract, item_kind
from fleet.v1 import worker_pb2

_DIGEST_LENGTH = 16


@dataclass(frozen=True)
class Wiring:
    """Slots that a coordinator supplies to a service and reads from it, each with its type.

    `variant` is the variant of the request; empty for a model with one variant.
    """

    variant: str
    supplied: Mapping[str, str]
    read: Mapping[str, str]

    @cached_property
    def text(self) -> str:
        """Canonical JSON for the store: equal for equal wirings."""
        return _json({"variant": self.variant, "supplied": dict(self.supplied), "read": dict(self.read)})

    @cached_property
    def digest(self) -> str:
        """Digest of the text, 16 hexadecimal digits."""
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()[:_DIGEST_LENGTH]

    def narrow(self, spec: ServiceSpec) -> ServiceSpec:
        """Return the service without outputs that only its own stages read.

        A worker of another release may omit these outputs.
        """
        outputs = {slot: kind for slot, kind in spec.contract.outputs.items() if slot in self.read}
        optional = spec.contract.optional_outputs.intersection(outputs)
        return replace(spec, contract=replace(spec.contract, outputs=outputs, optional_outputs=optional))


def wirings_of(variant: str, services: Sequence[ServiceSpec], given: Collection[str]) -> dict[str, Wiring]:
    """Return the wiring of each service of a variant. `given` are the slots that request validation supplies."""
    result = result_of(services)
    wirings: dict[str, Wiring] = {}
    written = set(given)
    for number, spec in enumerate(services):
        later = {slot for each in services[number + 1 :] for slot in each.contract.inputs} | {result}
        wirings[spec.service] = Wiring(
            variant,
            {slot: kind for slot, kind in spec.contract.inputs.items() if slot in written},
            {slot: kind for slot, kind in spec.contract.outputs.items() if slot in later},
        )
        written.update(spec.contract.outputs)
    return wirings


def fault_of(worker: worker_pb2.WorkerInfo, wiring: Wiring) -> str:
    """Return one sentence that states why a worker cannot run claims with a wiring; empty if it can.

    All required inputs of the worker must be supplied, and all slots that the coordinator reads must be outputs of the
    worker, with equal types. A supplied optional input must have an equal type, and a supplied stream must be read. A
    worker that announces no contract is compatible with every claim.
    """
    if not worker.HasField("contract"):
        return ""
    contract = contract_of(worker, wiring.variant)
    if contract is None:
        names = [each.variant or "one variant without a name" for each in worker.variant_contracts]
        return f"variant '{wiring.variant}': the worker serves only {', '.join(names)}"
    for slot, kind in sorted(contract.inputs.items()):
        supplied = wiring.supplied.get(slot)
        if supplied is None and slot not in contract.optional:
            return f"input '{slot}': the worker requires {kind}, the coordinator supplies none"
        if supplied is not None and supplied != kind:
            return f"input '{slot}': the worker reads {kind}, the coordinator supplies {supplied}"
    for slot, kind in sorted(wiring.supplied.items()):
        if item_kind(kind) and slot not in contract.inputs:
            return f"input '{slot}': the coordinator supplies {kind}, the worker reads none"
    for slot, kind in sorted(wiring.read.items()):
        written = contract.outputs.get(slot)
        if written != kind:
            return f"output '{slot}': the coordinator reads {kind}, the worker writes {written or 'none'}"
    return ""


def contract_of(worker: worker_pb2.WorkerInfo, variant: str) -> Contract | None:
    """Return the contract of a worker for a variant; None if the worker does not serve the variant.

    An empty name is the first variant. Workers of earlier releases have one contract for all variants.
    """
    if not worker.variant_contracts:
        return _contract(worker.service, worker.contract)
    for each in worker.variant_contracts:
        if each.variant == variant or not variant:
            return _contract(worker.service, each.contract)
    return None


def contract_text(worker: worker_pb2.WorkerInfo) -> str:
    """Return the contracts of a worker as JSON for the store; empty if it announces none."""
    if not worker.HasField("contract"):
        return ""
    if not worker.variant_contracts:
        return older_text(worker)
    variants = [
        {"name": each.variant, **_slots(_contract(worker.service, each.contract))} for each in worker.variant_contracts
    ]
    return _json({"variants": variants})


def older_text(worker: worker_pb2.WorkerInfo) -> str:
    """Return the contract of a worker in the format of the previous release, which compares strings."""
    contract = _contract(worker.service, worker.contract)
    parts = _slots(contract)
    if contract.optional_outputs:  # Releases without variants omit the key.
        parts["optional_outputs"] = sorted(contract.optional_outputs)
    return _json(parts)


def _contract(service: str, sent: worker_pb2.StageContract) -> Contract:
    optional, optional_outputs = frozenset(sent.optional_inputs), frozenset(sent.optional_outputs)
    return Contract(service, dict(sent.inputs), dict(sent.outputs), optional, optional_outputs)


def _slots(contract: Contract) -> dict[str, object]:
    return {
        "inputs": dict(contract.inputs),
        "outputs": dict(contract.outputs),
        "optional": sorted(contract.optional),
    }


def _json(parts: Mapping[str, object]) -> str:
    return json.dumps(parts, sort_keys=True, separators=(",", ":"))
