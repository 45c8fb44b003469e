"""GenerationService, the public API, without transport. Takes and returns messages; raises FleetErrors."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TypeVar

from common.codec import pack, write_param
from common.errors import InvalidInput, Unavailable
from common.log_context import hide_texts
from common.pipeline import ServiceSpec
from common.scaling import StageLoad
from common.state.records import State, is_terminal, require_own, require_succeeded, unknown_request
from common.state.requests import RequestStore, StoredEvent, checked_page_size
from common.state.result_items import StoredItem
from common.state.stage_loads import StageLoads
from common.state.store_health import StoreHealth
from common.state.workers import ServiceLoad, WorkerRegistry
from common.wiring import Wiring, wirings_of
from configs.sample.base import ParameterSpec
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import worker_pb2
from models.catalog import ServedModel, ServedVariant
from models.validation import InputValidationStage
from services.coordinator.activity import RequestActivities
from services.coordinator.callers import current_caller
from services.coordinator.cancellations import Cancellations
from services.coordinator.costs import costs_of, work_of
from services.coordinator.downloads import (
    Download,
    Part,
    download_response,
    generate_response,
    parts_in_memory,
    require_stored,
)
from services.coordinator.driver import Driver
from services.coordinator.handlers import Function
from services.coordinator.parameters import given_images, given_parameters, recorded_parameters
from services.coordinator.request_life import Execution, Submission
from services.coordinator.request_trace import RequestTrace
from services.coordinator.settings import CoordinatorSettings
from services.coordinator.state_lines import prompts_of

T = TypeVar("T")

_MAX_KEY = 128
_MAX_PRIORITY = 100
_MOST_GROUPS = 1_000
"""Maximum worker groups per service in a response of ListModels."""

_MOST_INCOMPATIBLE = 1_000
"""Maximum incompatible workers per service in a response of ListModels."""

_REQUEST_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
_LAST_SECOND = int(datetime(9999, 12, 31, tzinfo=UTC).timestamp())


@dataclass(frozen=True)
class OfferedModel:
    """A served model with the validation of its requests."""

    served: ServedModel
    validation: InputValidationStage

    @classmethod
    def of(cls, served: ServedModel) -> OfferedModel:
        """Prepare a model for requests."""
        return cls(served, InputValidationStage(served))

    @property
    def services(self) -> tuple[ServiceSpec, ...]:
        """The services of all variants."""
        return self.served.services

    @cached_property
    def wirings(self) -> Mapping[str, Sequence[Wiring]]:
        """The inputs and outputs of each service, for each variant that uses the service."""
        found = [wirings_of(each.name, each.services, each.pipeline.given) for each in self.served.variants]
        return {spec.service: [each[spec.service] for each in found if spec.service in each] for spec in self.services}


class GenerationService:
    """The RPCs of fleet.v1.GenerationService, by name in `functions`."""

    def __init__(
        self,
        models: Mapping[str, OfferedModel],
        store: RequestStore,
        registry: WorkerRegistry,
        loads: StageLoads,
        driver: Driver,
        settings: CoordinatorSettings,
        *,
        health: StoreHealth,
        activities: RequestActivities,
    ) -> None:
        self._models = models
        self._store = store
        self._registry = registry
        self._loads = loads
        self._driver = driver
        self._settings = settings
        self._health = health
        self._activities = activities
        self._closing = asyncio.Event()
        self.cancellations = Cancellations(store)
        self.functions: dict[str, Function] = {
            "Submit": self.submit,
            "Generate": self.generate,
            "Watch": self.watch,
            "DownloadResult": self.download_result,
            "GetRequest": self.get_request,
            "CancelRequest": self.cancel_request,
            "ListRequests": self.list_requests,
            "ListModels": self.list_models,
        }

    def close(self) -> None:
        """End streams of requests that run at other coordinators. Callers can continue these streams there."""
        self._closing.set()

    async def submit(self, request: pb.SubmitRequest) -> pb.SubmitResponse:
        """Submit: admit a request."""
        self._hide_prompts(request)
        trace = RequestTrace.begin()
        with trace.accepting():
            submission = self._validated(request, trace)
            if submission.raw:
                raise InvalidInput(
                    "output_format: SAFETENSORS is not a stored format; use Generate, which streams it",
                    field="output_format",
                )
            admission, _ = await self._driver.accept(submission)
        return pb.SubmitResponse(request=admission.record, replayed=admission.replayed)

    def _hide_prompts(self, request: pb.SubmitRequest) -> None:
        """Hide the prompts of a request in the log lines of this call."""
        if not self._settings.log_prompts:
            hide_texts(prompts_of(request.parameters).values())

    async def generate(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Generate: admit a request, stream its events and its files."""
        self._hide_prompts(request.request)
        trace = RequestTrace.begin()
        submission: Submission | None = None
        ended, follow = False, request.follow
        try:
            with trace.accepting():
                submission = self._validated(request.request, trace)
                if submission.raw and submission.idempotency_key:
                    raise InvalidInput(
                        "idempotency_key: a safetensors result is never stored and cannot be replayed; omit the key",
                        field="idempotency_key",
                    )
                admission, execution = await self._driver.accept(submission)
            request_id = admission.record.request_id
            yield pb.GenerateResponse(accepted=admission.record)
            state, download = State.REQUEST_STATE_UNSPECIFIED, Download(self._store, request_id)
            async with aclosing(self._followed(request_id, execution)) as events:
                async for event, epoch in events:
                    yield pb.GenerateResponse(event=event)
                    state = event.state_change.state
                    if follow and event.HasField("item"):
                        async for part in download.item(StoredItem(event.item, epoch)):
                            yield generate_response(part, follow=follow)
            ended = True
            if state == State.REQUEST_STATE_SUCCEEDED:
                async for part in self._rest(request_id, execution, download):
                    yield generate_response(part, follow=follow)
        finally:
            is_left = not (ended or self._closing.is_set())
            if is_left and submission is not None and not submission.idempotency_key:
                self._driver.cancel(submission.record.request_id)

    async def _followed(self, request_id: str, execution: Execution | None) -> AsyncGenerator[StoredEvent, None]:
        """Yield all events of a request, from memory while it runs here, else from the store."""
        last = ""
        if execution is not None:
            async for event in execution.log.follow():
                last = event.event_id
                yield StoredEvent(event, execution.epoch)
                if is_terminal(event.state_change.state):
                    return
        async with aclosing(self._until_closing(request_id, self._store.stored_events(request_id, last))) as events:
            async for stored in events:
                yield stored

    async def _rest(self, request_id: str, execution: Execution | None, download: Download) -> AsyncIterator[Part]:
        """The remaining parts of a successful result: from memory if all parts are there, else from the store."""
        files = None if execution is None else execution.files
        if files is not None and not any(file.header.num_items for file in files):
            for part in parts_in_memory(files):
                yield part
            return
        async for part in download.rest(await self._store.get(request_id)):
            yield part

    async def watch(self, request: pb.WatchRequest) -> AsyncGenerator[pb.WatchResponse, None]:
        """Watch: stream the events of a request."""
        request_id = self._checked_id(request.request_id)
        await self._require_own(request_id)
        stored = self._store.events(request_id, request.after_event_id)
        async with aclosing(self._until_closing(request_id, stored)) as events:
            async for event in events:
                yield pb.WatchResponse(event=event)

    async def _until_closing(self, request_id: str, events: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Yield the events of a request. Raises Unavailable after close() if it runs at another coordinator."""
        closing = asyncio.create_task(self._closing.wait())
        upcoming: asyncio.Future[T | None] = asyncio.get_running_loop().create_future()
        try:
            while True:
                upcoming = asyncio.ensure_future(anext(events, None))
                waits = {upcoming} if self._driver.runs(request_id) else {upcoming, closing}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if not upcoming.done():
                    raise Unavailable("this coordinator is shutting down; repeat the call from the last event")
                event = upcoming.result()
                if event is None:
                    return
                yield event
        finally:
            closing.cancel()
            if not upcoming.done():
                upcoming.cancel()
                await asyncio.wait({upcoming})
            await events.aclose()

    async def download_result(
        self, request: pb.DownloadResultRequest
    ) -> AsyncGenerator[pb.DownloadResultResponse, None]:
        """DownloadResult: stream the files. With `follow`, also streams growing files."""
        record = await self._own(request.request_id)
        download = Download(
            self._store, record.request_id, request.index if request.HasField("index") else None, request.offset
        )
        if request.follow and not is_terminal(record.state):
            require_stored(record)
            stored = self._store.stored_events(record.request_id)
            async with aclosing(self._until_closing(record.request_id, stored)) as events:
                async for event, epoch in events:
                    if event.HasField("item"):
                        async for part in download.item(StoredItem(event.item, epoch)):
                            yield download_response(part, follow=True)
            record = await self._store.get(record.request_id)
        require_succeeded(record)
        async for part in download.rest(record):
            yield download_response(part, follow=request.follow)

    async def get_request(self, request: pb.GetRequestRequest) -> pb.GetRequestResponse:
        """GetRequest: return the record of a request, with its timeline if `with_timeline` is set."""
        record = await self._own(request.request_id)
        timeline = await self._store.timelines.read(record.request_id) if request.with_timeline else ()
        return pb.GetRequestResponse(request=record, timeline=timeline)

    async def cancel_request(self, request: pb.CancelRequestRequest) -> pb.CancelRequestResponse:
        """CancelRequest: cancel a request."""
        request_id = self._checked_id(request.request_id)
        await self._require_own(request_id)
        self._driver.cancel(request_id)
        return pb.CancelRequestResponse(request=await self.cancellations.cancel(request_id))

    async def _own(self, request_id: str) -> pb.RequestRecord:
        """The record of one of the caller's requests. Raises NotFound."""
        record = await self._store.get(self._checked_id(request_id))
        require_own(record, current_caller().name, self._settings.record_seconds)
        return record

    async def _require_own(self, request_id: str) -> None:
        if current_caller().name:
            await self._own(request_id)

    async def list_requests(self, request: pb.ListRequestsRequest) -> pb.ListRequestsResponse:
        """ListRequests: return a page of requests."""
        if request.state not in State.values():
            raise InvalidInput(f"state: {request.state} is not a RequestState", field="state")
        if request.with_activity:
            return await self._list_activities(request)
        records, token = await self._store.page(
            page_size=request.page_size,
            page_token=request.page_token,
            state=request.state,
            model=request.model,
            caller=current_caller().name,
        )
        return pb.ListRequestsResponse(requests=records, next_page_token=token)

    async def _list_activities(self, request: pb.ListRequestsRequest) -> pb.ListRequestsResponse:
        for field, is_set in (("state", bool(request.state)), ("page_token", bool(request.page_token))):
            if is_set:
                raise InvalidInput(f"{field} cannot be combined with with_activity; omit {field}", field=field)
        most = checked_page_size(request.page_size)
        names = [request.model] if request.model else list(self._models)
        services = {
            name: [spec.service for spec in self._models[name].services] for name in names if name in self._models
        }
        return await self._activities.list(services, caller=current_caller().name, most=most)

    async def list_models(self, request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        """ListModels: return the models, their workers and the state of the store."""
        del request
        models = [await self._model(model) for model in self._models.values()]
        return pb.ListModelsResponse(models=models, store=await self._health.read())

    async def _model(self, model: OfferedModel) -> pb.Model:
        served = model.served
        loads = [
            (
                spec,
                await self._registry.load(served.name, spec.service, model.wirings[spec.service]),
                await self._loads.recent(served.name, spec.service),
                await self._loads.paces(served.name, spec.service),
            )
            for spec in model.services
        ]
        return pb.Model(
            name=served.name,
            pipeline_name=served.checkpoint.pipeline_name,
            fingerprint=served.checkpoint.fingerprint,
            parameters=[_parameter(spec) for spec in served.parameters()],
            services=[_service_status(*each) for each in loads],
            variants=[
                *(_variant(each) for each in served.variants),
                *(pb.Variant(name=name, error=reason) for name, reason in served.unserved.items()),
            ],
            refused_workers=await self._registry.refusals(served.name),
        )

    def _validated(self, request: pb.SubmitRequest, trace: RequestTrace, variant: str = "") -> Submission:
        """Validate a request as far as possible without weights, and set its defaults.

        The inputs select the variant, unless `variant` names the variant of an earlier admission.
        """
        caller = current_caller()
        model = self._chosen(request.model)
        _check_envelope(request)
        given = given_parameters(request.parameters)
        validated = model.validation.run(given, given_images(request.parameters), recorded=variant)
        services = validated.variant.services
        parameters = recorded_parameters(validated.params.as_mapping())
        record = pb.RequestRecord(
            request_id=secrets.token_hex(8),
            model=model.served.name,
            parameters=parameters,
            caller=caller.name,
            priority=request.priority,
            deadline=request.deadline if request.HasField("deadline") else None,
            variant=validated.variant.name,
            trace=trace.stored,
        )
        for warning in validated.warnings:
            record.warnings.add(field=warning.field, message=warning.message)
        return Submission(
            record,
            services,
            {slot: pack(slot, artifact) for slot, artifact in validated.artifacts.items()},
            self._settings.limits(tuple(spec.service for spec in services), caller.max_open),
            request.idempotency_key,
            raw=parameters.output_format == pb.OUTPUT_FORMAT_SAFETENSORS,
            stored=_stored(request, record),
            costs=costs_of(services, validated.params),
            work=work_of(services, validated.params, validated.variant.name),
            trace=trace,
        )

    def restore(self, record: pb.RequestRecord, stored: bytes) -> Submission:
        """Restore a request that another coordinator admitted. Raises FleetError if it cannot run here."""
        trace = RequestTrace.resume(record)
        submission = self._validated(pb.SubmitRequest.FromString(stored), trace, record.variant)
        record.variant = submission.record.variant  # Coordinators of earlier versions record no variant.
        return replace(submission, record=record, stored=stored)

    def _checked_id(self, request_id: str) -> str:
        if not _REQUEST_ID.fullmatch(request_id):
            raise unknown_request(request_id, self._settings.record_seconds)
        return request_id

    def _chosen(self, name: str) -> OfferedModel:
        if not name and len(self._models) == 1:
            return next(iter(self._models.values()))
        if name not in self._models:
            served = ", ".join(sorted(self._models))
            what = f"model: {name[:80]!r} is not served" if name else "model is empty"
            raise InvalidInput(f"{what}; this fleet serves {served}", field="model")
        return self._models[name]


def _service_status(
    spec: ServiceSpec, load: ServiceLoad, work: StageLoad, paces: Iterable[pb.ServicePace]
) -> pb.ServiceStatus:
    return pb.ServiceStatus(
        service=spec.service,
        workers=len(load.workers),
        capacity=load.capacity,
        busy=load.busy,
        queued=load.queued,
        queued_seconds=work.queued_seconds,
        unmeasured=work.unmeasured,
        groups=[worker.degrees for worker in load.workers if worker.HasField("degrees")][:_MOST_GROUPS],
        kernels=_distinct(each for worker in load.workers for each in worker.kernels),
        dead_workers=load.dead,
        open_requests=work.open_requests,
        reports_steps=spec.reports_steps,
        paces=paces,
        incompatible_workers=[
            worker_pb2.IncompatibleWorker(worker_id=each.worker_id, variant=each.variant, reason=each.reason)
            for each in load.incompatible[:_MOST_INCOMPATIBLE]
        ],
    )


def _stored(request: pb.SubmitRequest, record: pb.RequestRecord) -> bytes:
    """The serialized submission for a take-over: model, parameters with images, and the drawn seed."""
    stored = pb.SubmitRequest(model=record.model, parameters=request.parameters)
    stored.parameters.seed = record.parameters.seed
    return stored.SerializeToString()


def _distinct(packages: Iterable[worker_pb2.KernelPackage]) -> list[worker_pb2.KernelPackage]:
    """Distinct kernel packages of several workers, sorted by name."""
    found = {each.SerializeToString(deterministic=True): each for each in packages}
    return sorted(found.values(), key=lambda each: (each.name, each.version, each.error))


def _check_envelope(request: pb.SubmitRequest) -> None:
    """Check idempotency key, priority and deadline of a request. Raises InvalidInput."""
    if len(request.idempotency_key) > _MAX_KEY:
        raise InvalidInput(
            f"idempotency_key: {len(request.idempotency_key)} characters are more than {_MAX_KEY}; a shorter key works",
            field="idempotency_key",
        )
    if not -_MAX_PRIORITY <= request.priority <= _MAX_PRIORITY:
        raise InvalidInput(
            f"priority: {request.priority} is not from -{_MAX_PRIORITY} to {_MAX_PRIORITY}; 0 works", field="priority"
        )
    deadline = request.deadline
    if request.HasField("deadline") and not (
        0 < deadline.seconds <= _LAST_SECOND and 0 <= deadline.nanos < 1_000_000_000
    ):
        raise InvalidInput(
            f"deadline: {deadline.seconds} s and {deadline.nanos} ns is not a timestamp from 1970 to 9999",
            field="deadline",
        )


def _variant(variant: ServedVariant) -> pb.Variant:
    return pb.Variant(
        name=variant.name,
        parameters=map(_parameter, variant.parameters()),
        services=[spec.service for spec in variant.services],
        required_images=variant.roles.required,
        optional_images=variant.roles.optional,
    )


def _parameter(spec: ParameterSpec) -> pb.Parameter:
    default = None if spec.default is None else write_param(spec.name, spec.default)
    return pb.Parameter(name=spec.name, type=spec.type, default_value=default, description=spec.description)
