"""ComposedPipeline: the ordered stages of one model. The constructor validates that the stages compose."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from common.errors import Cancelled, CheckpointError, InternalError
from common.stage import Call, Contract, compose_contracts, item_kind
from common.streams import STREAM_BYTES, ItemBuffer

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint


class MissingModules(CheckpointError):
    """The checkpoint lacks modules that a pipeline requires. Other variants of the model may not require them."""


class PipelineError(Exception):
    """The stages do not compose: a defect of the pipeline class, detected by its constructor."""


class Cost(IntEnum):
    """Quantity that is proportional to the work of a stage. The cost of a service is the largest cost of its stages."""

    REQUEST = 0
    """Constant per request."""
    PIXEL = 1
    """Number of pixels of all frames and outputs."""
    PIXEL_STEP = 2
    """Number of pixels of all frames and outputs, times denoising steps."""


@dataclass(frozen=True)
class StageSpec:
    """Description of a stage for services that do not import it and do not interpret slot names.

    `implementation` is "package.module:Class"; only the service that hosts the stage imports it. `modules` maps roles,
    which the stage uses, to names of checkpoint modules in model_index.json. A role denotes the same module in all
    stages of a pipeline. `reports_steps`: progress counts denoising steps. `result`: the output slot that contains the
    request's result. Raises PipelineError for a result that the stage does not write.
    """

    contract: Contract
    service: str
    implementation: str
    modules: Mapping[str, str] = field(default_factory=dict)
    cost: Cost = Cost.REQUEST
    reports_steps: bool = False
    result: str | None = None

    def __post_init__(self) -> None:
        if self.result is not None and self.result not in self.contract.outputs:
            raise PipelineError(f"{self.contract.name}: result {self.result!r} is not one of its outputs")

    @property
    def resume_slot(self) -> str | None:
        """Input slot of the step checkpoint to resume from; None if the stage cannot be resumed."""
        return self.contract.resume_slot


@dataclass(frozen=True)
class ServiceSpec:
    """Stages that one service hosts: the ordered stages of one variant, or all variants' distinct stages."""

    service: str
    contract: Contract
    stages: tuple[StageSpec, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Distinct checkpoint modules that the service loads, in the order of use."""
        return tuple(dict.fromkeys(module for stage in self.stages for module in stage.modules.values()))

    def module_of(self, role: str) -> str | None:
        """Return the module with a role; None if no stage of the service uses the role."""
        return next((stage.modules[role] for stage in self.stages if role in stage.modules), None)

    @property
    def cost(self) -> Cost:
        """Largest cost of the stages: the quantity that is proportional to the service's work."""
        return max(stage.cost for stage in self.stages)

    @property
    def reports_steps(self) -> bool:
        """Whether the service's progress counts denoising steps."""
        return any(stage.reports_steps for stage in self.stages)

    @property
    def resume_slot(self) -> str | None:
        """Input slot of the step checkpoint to resume from; None if the service cannot be resumed."""
        return self.contract.resume_slot


class Runner(Protocol):
    """Runs the stages of a contract, in this process or over gRPC. The pipeline does not interpret the values."""

    @property
    def contract(self) -> Contract:
        """Slots that the stages read and write."""

    async def __call__(self, values: Mapping[str, Any], call: Call) -> Mapping[str, Any]:
        """Compute the values of the contract's outputs from the values of its inputs."""


class ComposedPipeline:
    """The ordered stages of one variant of a model. One subclass per variant.

    `modules` are the module names in the checkpoint's model_index.json. Raises MissingModules if a required module is
    missing, and PipelineError if the stages do not compose.
    """

    pipeline_name: ClassVar[str]
    _required_config_modules: ClassVar[tuple[str, ...]]
    given: ClassVar[Mapping[str, str]] = {"prompt": "Prompt", "canvas": "Canvas", "sampling": "Sampling"}
    """Artifact name of each slot that request validation supplies."""
    relatives: ClassVar[tuple[str, ...]] = ()
    """Prefixes of unsupported `_class_name`s for which error messages suggest this pipeline."""

    def __init__(self, modules: Collection[str]) -> None:
        missing = [name for name in self._required_config_modules if name not in modules]
        if missing:
            raise MissingModules(
                f"{self.pipeline_name} needs the modules {', '.join(self._required_config_modules)}; "
                f"model_index.json lacks {', '.join(missing)}"
            )
        self._stages: list[StageSpec] = []
        self.create_pipeline_stages()
        for stage in self._stages:
            if absent := [name for name in stage.modules.values() if name not in modules]:
                raise PipelineError(f"{stage.contract.name} requires {', '.join(absent)}, which model_index.json lacks")
        self.roles = unite_roles(stage.modules for stage in self._stages)
        self._leave_out_unread()
        check(self.services, given=self.given, wanted=(result_of(self.services),))

    def _leave_out_unread(self) -> None:
        """Remove optional outputs that no later stage reads, so that they are neither computed nor sent."""
        read = {stage.result for stage in self._stages if stage.result is not None}
        for index, stage in reversed(list(enumerate(self._stages))):
            self._stages[index] = replace(stage, contract=stage.contract.writing(read))
            read |= stage.contract.inputs.keys()

    @classmethod
    def variants(cls, checkpoint: Checkpoint) -> Mapping[str, type[ComposedPipeline]]:
        """Return the pipelines of a checkpoint by variant name. Default: this class as a single, unnamed variant.

        A request runs on the first variant that accepts its images and has all its parameters, else on the first
        variant that accepts its images. Each variant has separate configs in the registry. Names are lower-case
        identifiers; only a single variant has an empty name.
        """
        del checkpoint
        return {"": cls}

    def create_pipeline_stages(self) -> None:
        """Add this variant's stages in order, with add_stage()."""
        raise PipelineError(f"{type(self).__name__} defines no stages")

    def add_stage(self, stage: StageSpec) -> None:
        """Append a stage."""
        self._stages.append(stage)

    @property
    def services(self) -> tuple[ServiceSpec, ...]:
        """Services of this variant, in order. Raises PipelineError if the stages of a service are not consecutive."""
        runs = [(service, tuple(run)) for service, run in groupby(self._stages, key=lambda stage: stage.service)]
        names = [service for service, _ in runs]
        if twice := {name for name in names if names.count(name) > 1}:
            raise PipelineError(f"the stages of {', '.join(sorted(twice))} are not consecutive")
        for service, run in runs:
            if len(resumable := [stage.contract.name for stage in run if stage.resume_slot is not None]) > 1:
                raise PipelineError(f"{service} has several resumable stages, {', '.join(resumable)}; it can have one")
        return tuple(
            ServiceSpec(service, compose_contracts(service, [stage.contract for stage in run]), run)
            for service, run in runs
        )

    def service(self, name: str) -> ServiceSpec:
        """Return the service with a name. Raises PipelineError if the model does not use it."""
        for spec in self.services:
            if spec.service == name:
                return spec
        used = ", ".join(spec.service for spec in self.services)
        raise PipelineError(f"{self.pipeline_name} has no {name} service; it has {used}")


def result_of(services: Sequence[ServiceSpec]) -> str:
    """Return the slot of the request's result. Raises PipelineError unless exactly one stage declares a result."""
    declared = [stage.result for service in services for stage in service.stages if stage.result is not None]
    if len(declared) != 1:
        raise PipelineError(f"results {declared} are declared; a pipeline has exactly one")
    return declared[0]


async def run_pipeline(
    runners: Sequence[Runner], values: Mapping[str, Any], call: Call, *, wanted: Sequence[str]
) -> dict[str, Any]:
    """Run each service as soon as its inputs are available. Return the values of the `wanted` slots.

    Independent services overlap. The value of a stream is an ItemBuffer: its reader starts at the first item, while the
    writer runs. For a wanted stream, a tuple of all items is returned. A slot's value is released after its last
    reader. The first error cancels the other services and is raised unchanged; cancellation of the calling task takes
    precedence over errors.
    """
    loop = asyncio.get_running_loop()
    produced = [slot for runner in runners for slot in runner.contract.outputs]
    slots: dict[str, asyncio.Future[Any]] = {name: loop.create_future() for name in (*values, *produced)}
    for name, value in values.items():
        slots[name].set_result(value)
    readers = {name: sum(name in r.contract.inputs for r in runners) + (name in wanted) for name in slots}

    def release(name: str) -> None:
        readers[name] -= 1
        if not readers[name]:
            del slots[name]

    async def run_service(runner: Runner) -> None:
        contract = runner.contract
        present = [name for name in contract.inputs if name in slots]
        inputs = {name: await slots[name] for name in present}
        for name in contract.input_streams:
            await inputs[name].wait_for_first()
        streams = {name: ItemBuffer(math.inf if name in wanted else STREAM_BYTES) for name in contract.output_streams}
        for name, stream in streams.items():
            slots[name].set_result(stream)
        outputs = await _run(runner, inputs, replace(call, sinks={**call.sinks, **streams}) if streams else call)
        for stream in streams.values():
            stream.close()
        for name in contract.outputs.keys() - streams.keys():
            if readers[name]:
                slots[name].set_result(outputs[name])
        for name in present:
            release(name)

    # Not asyncio.TaskGroup: in Python 3.11 it leaves the calling task marked as cancelled after an error.
    finished: list[asyncio.Task[None]] = []
    tasks = [asyncio.create_task(run_service(runner), name=runner.contract.name) for runner in runners]
    for task in tasks:
        task.add_done_callback(finished.append)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in finished:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
    results = {name: slots[name].result() for name in wanted}
    return {
        name: tuple([item async for item, _ in value.read()]) if isinstance(value, ItemBuffer) else value
        for name, value in results.items()
    }


async def _run(runner: Runner, values: Mapping[str, Any], call: Call) -> Mapping[str, Any]:
    """Run one service. Raises InternalError for missing outputs, and Cancelled if the runner cancels itself.

    Without Cancelled, the readers of the runner's outputs would wait forever.
    """
    try:
        outputs = await runner(values, call)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Cancelled(f"{runner.contract.name} was cancelled") from None
    returned = runner.contract.outputs.keys() - runner.contract.output_streams
    if absent := sorted(name for name in returned if name not in outputs):
        raise InternalError(f"{runner.contract.name} did not return {', '.join(absent)}")
    return outputs


def unite_roles(modules: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Merge role-to-module mappings of stages or pipelines. Raises PipelineError for a role with two modules."""
    roles: dict[str, str] = {}
    for role, name in (pair for each in modules for pair in each.items()):
        if roles.setdefault(role, name) != name:
            raise PipelineError(f"role {role!r} is assigned to {roles[role]} and {name}; a role has one module")
    return roles


def check(services: Sequence[ServiceSpec], *, given: Mapping[str, str], wanted: Sequence[str]) -> None:
    """Validate that services compose. Raises PipelineError with all problems.

    Every slot is written exactly once, before it is read, with the artifact type that its readers expect. Every
    required output is read. A stream has exactly one reader, in another service than its writer.
    """
    known = dict(given)
    problems: list[str] = []
    contracts = [stage.contract for service in services for stage in service.stages]
    written = {slot for contract in contracts for slot in contract.outputs}
    read = {*wanted, *(slot for contract in contracts for slot in contract.inputs)}
    streamed: set[str] = set()
    for stage in contracts:
        for slot, kind in stage.inputs.items():
            if slot not in known and (slot in written or slot not in stage.optional):
                problems.append(f"{stage.name} reads {slot!r}, which no earlier stage writes")
            elif known.get(slot, kind) != kind:
                problems.append(f"{stage.name} reads {slot!r} as {kind}, but it is {known[slot]}")
            if item_kind(kind) and (slot in streamed or slot in wanted):
                problems.append(f"{stage.name} reads the stream {slot!r}, which has another reader already")
            streamed.update([slot] if item_kind(kind) else [])
        for slot, kind in stage.outputs.items():
            if slot in known:
                problems.append(f"{stage.name} writes {slot!r}, which is already written")
            elif slot not in read and slot not in stage.optional_outputs:
                problems.append(f"{stage.name} writes {slot!r}, which nothing reads")
            known[slot] = kind
    problems += [f"nothing writes {slot!r}, which the caller wants" for slot in wanted if slot not in known]
    for service in services:
        written_here = {slot for stage in service.stages for slot in stage.contract.output_streams}
        if inner := sorted(written_here & {slot for stage in service.stages for slot in stage.contract.inputs}):
            problems.append(f"{service.service} reads the stream {', '.join(inner)}, which it writes itself")
        if service.contract.input_streams and service.resume_slot is not None:
            problems.append(f"{service.service} has a resume slot and reads a stream; a service cannot do both")
        if len(several := sorted(service.contract.input_streams)) > 1:
            problems.append(f"{service.service} reads the streams {', '.join(several)}; a service reads at most one")
    if problems:
        raise PipelineError("; ".join(problems))
