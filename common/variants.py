"""Hosts all variants of a model in one service: the union of their contracts, and all their stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from common.errors import InvalidInput
from common.local import HostedStages, common_indifference, untimed
from common.pipeline import PipelineError, ServiceSpec
from common.stage import Call, Contract, PipelineStage


def unite_contracts(name: str, contracts: Sequence[Contract]) -> Contract:
    """Return the union of the variants' contracts. Slots that a variant lacks become optional.

    Raises PipelineError if two variants use different artifacts for one slot, or resume from different slots.
    """
    inputs = _united(name, [contract.inputs for contract in contracts])
    outputs = _united(name, [contract.outputs for contract in contracts])
    required = frozenset.intersection(*(frozenset(each.inputs) - each.optional for each in contracts))
    always = frozenset.intersection(*(frozenset(each.outputs) - each.optional_outputs for each in contracts))
    resumed = {contract.resume_slot for contract in contracts if contract.resume_slot is not None}
    if len(resumed) > 1:
        raise PipelineError(f"{name}: variants resume from different slots: {', '.join(sorted(resumed))}")
    optional, optional_outputs = frozenset(inputs.keys() - required), frozenset(outputs.keys() - always)
    return Contract(
        name,
        inputs,
        outputs,
        optional=optional,
        optional_outputs=optional_outputs,
        resume_slot=next(iter(resumed), None),
    )


def _united(name: str, slots: Sequence[Mapping[str, str]]) -> dict[str, str]:
    united: dict[str, str] = {}
    for each in slots:
        for slot, kind in each.items():
            if united.setdefault(slot, kind) != kind:
                raise PipelineError(f"{name}: variants declare {slot!r} as {united[slot]} and as {kind}")
    return united


def unite_services(variants: Sequence[Sequence[ServiceSpec]]) -> tuple[ServiceSpec, ...]:
    """Return the distinct services of all variants, each with the union of its contracts and stages.

    Each service follows its predecessor in the first variant that uses it. Raises the errors of unite_contracts().
    """
    if len(variants) == 1:
        return tuple(variants[0])
    names: list[str] = []
    for services in variants:
        position = 0
        for spec in services:
            if spec.service not in names:
                names.insert(position, spec.service)
            position = names.index(spec.service) + 1
    return tuple(_united_service(name, [spec for each in variants for spec in each]) for name in names)


def _united_service(name: str, services: Sequence[ServiceSpec]) -> ServiceSpec:
    found = [spec for spec in services if spec.service == name]
    stages = [stage for spec in found for stage in spec.stages]
    distinct = tuple(stage for number, stage in enumerate(stages) if stage not in stages[:number])
    return ServiceSpec(name, unite_contracts(name, [spec.contract for spec in found]), distinct)


class HostedVariants:
    """Stages of a service for every variant of a model. Each call runs the stages of its variant.

    `variants` maps variant names to stages, in the model's order. A call without a variant runs the first
    variant. `timed` returns the context in which a stage of the given name runs.
    """

    def __init__(
        self,
        service: str,
        variants: Mapping[str, Sequence[PipelineStage[Any, Any]]],
        *,
        timed: Callable[[str], AbstractContextManager[None]] = untimed,
    ) -> None:
        self._service = service
        self._variants = {name: HostedStages(service, stages, timed=timed) for name, stages in variants.items()}
        hosted = self._variants.values()
        self.contract = unite_contracts(service, [stages.contract for stages in hosted])
        self.indifferent_to = common_indifference([stages.indifferent_to for stages in hosted])

    @property
    def contracts(self) -> dict[str, Contract]:
        """Contract of each variant, in the model's order."""
        return {name: stages.contract for name, stages in self._variants.items()}

    def of(self, variant: str) -> HostedStages:
        """Return the stages of a variant. Raises InvalidInput with the variants for an unknown name."""
        if not variant:
            return next(iter(self._variants.values()))
        if variant not in self._variants:
            served = ", ".join(filter(None, self._variants)) or "one variant without a name"
            message = f"variant: {variant[:80]!r} is not a variant that {self._service} serves; it serves {served}"
            raise InvalidInput(message, field="variant")
        return self._variants[variant]

    def contract_of(self, variant: str) -> Contract:
        """Return the contract of a variant. Raises InvalidInput for an unknown name."""
        return self.of(variant).contract

    def run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        """Run the stages of the call's variant on artifacts by slot. Returns the outputs of its contract."""
        return self.of(call.variant).run(values, call)
