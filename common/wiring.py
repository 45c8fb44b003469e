"""Wiring: the slots that a coordinator supplies to a service and reads from it, and which workers fit.

A coordinator and its workers may be one release apart. Each worker announces its contract; a claim has the wiring of
its request at the service. The store compares both before it grants a claim: common/state/lua/contracts.lua has the
same rule. The coordinator compares again, since processes of the last release hand out slots without a comparison.
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
    """The slots that a coordinator supplies to a service, and those that it reads from it, each with its type.

    `variant` is the model's variant that the request is for; empty for a model with one variant.
    """

    variant: str
    supplied: Mapping[str, str]
    read: Mapping[str, str]

    @cached_property
    def text(self) -> str:
        """The form that the store reads; equal where the wirings are."""
        return _json({"variant": self.variant, "supplied": dict(self.supplied), "read": dict(self.read)})

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for the text."""
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()[:_DIGEST_LENGTH]

    def narrow(self, spec: ServiceSpec) -> ServiceSpec:
        """The service without the outputs that only its own stages read: another release may not return them."""
        outputs = {slot: kind for slot, kind in spec.contract.outputs.items() if slot in self.read}
        optional = spec.contract.optional_outputs.intersection(outputs)
        return replace(spec, contract=replace(spec.contract, outputs=outputs, optional_outputs=optional))


def wirings_of(variant: str, services: Sequence[ServiceSpec], given: Collection[str]) -> dict[str, Wiring]:
    """The wiring of each service of a variant. `given` are the slots that validation fills from the request."""
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
    """Why a worker cannot take claims with a wiring, in one sentence; empty where it can.

    Its required inputs must be supplied, and its outputs must cover those that are read, with equal types. An optional
    input that is supplied must have an equal type too, and a stream that is supplied must be read. A worker that
    announces no contract can take every claim.
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
    """What a worker reads and writes for a variant; None where it does not serve the variant.

    Without a name, the first variant. A worker of a release that announces no variants has one contract for all.
    """
    if not worker.variant_contracts:
        return _contract(worker.service, worker.contract)
    for each in worker.variant_contracts:
        if each.variant == variant or not variant:
            return _contract(worker.service, each.contract)
    return None


def contract_text(worker: worker_pb2.WorkerInfo) -> str:
    """The contracts of a worker in the form that the store reads; empty where it announces none."""
    if not worker.HasField("contract"):
        return ""
    if not worker.variant_contracts:
        return older_text(worker)
    variants = [
        {"name": each.variant, **_slots(_contract(worker.service, each.contract))} for each in worker.variant_contracts
    ]
    return _json({"variants": variants})


def older_text(worker: worker_pb2.WorkerInfo) -> str:
    """The contract of a worker as the last release states it: equal texts are equal contracts there."""
    contract = _contract(worker.service, worker.contract)
    parts = _slots(contract)
    if contract.optional_outputs:  # Left out by releases without variants.
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
