"""Checks of a running fleet: proxies, health, API contract, models and workers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import urlsplit

import grpc
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from common.errors import FleetError, PermissionDenied, Unauthenticated, Unavailable
from common.rpc.address import proxy_variable
from common.rpc.client import open_channel
from common.rpc.status import from_rpc_error
from fleet.v1 import generation_pb2
from services.cli.access import Access
from services.cli.client import FleetClient
from services.cli.doctor_results import Result, error, ok, warning
from services.cli.status_cells import kernel_cells, refused_cells
from services.start_up import plain

_SERVICE = "fleet.v1.GenerationService"
_SUBMIT = f"{_SERVICE}/Submit"
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_SECONDS = 10.0
_MOST_NAMED = 5


def check_proxies(endpoint: str, environ: Mapping[str, str] = os.environ) -> Iterator[Result]:
    """Check whether proxy variables redirect gRPC connections to `endpoint`.

    If `endpoint` is empty, checks connections to any host.
    """
    given = {name: environ[name] for name in _PROXIES if environ.get(name)}
    if not given:
        yield ok("proxies", f"none of {', '.join(_PROXIES)} is set")
        return
    shown = ", ".join(f"{name} is {_host(value)}" for name, value in given.items())
    excluded = environ.get("no_grpc_proxy") or environ.get("no_proxy") or ""
    beyond = f"no_proxy is {excluded}" if excluded else "no_proxy is not set"
    if not endpoint:
        if excluded:
            yield ok("proxies", f"{shown}; {beyond}")
        else:
            advice = "list the hosts of fleets in no_proxy"
            yield warning("proxies", f"{shown}, and {beyond}: gRPC connects to other hosts through the proxy", advice)
    elif variable := proxy_variable(endpoint, environ):
        yield warning(
            "proxies",
            f"gRPC connects to {endpoint} through the proxy {_host(given[variable])} of {variable}; {beyond}",
            f"add {endpoint.rpartition(':')[0]} to no_proxy, unless the host is reachable only through that proxy",
        )
    else:
        yield ok("proxies", f"{shown}, but not for {endpoint}; {beyond}")


def _host(proxy: str) -> str:
    """HOST:PORT of a proxy URL, without credentials."""
    return (urlsplit(proxy).netloc or proxy).rpartition("@")[2]


def check_endpoint(endpoint: str, access: Access, own: Mapping[str, str]) -> Iterable[Result]:
    """Check health, API contract, models and workers of the fleet at an endpoint.

    `own` maps the names of the models in --model to their checkpoint fingerprints. Raises Unavailable if no fleet
    answers.
    """
    return asyncio.run(_collect(endpoint, access, own))


async def _collect(endpoint: str, access: Access, own: Mapping[str, str]) -> list[Result]:
    channel = open_channel(endpoint, access.credentials, may_use_proxy=True)
    client = FleetClient(endpoint, channel, api_key=access.api_key, is_tls=access.credentials is not None)
    results: list[Result] = []
    try:
        async with asyncio.timeout(_SECONDS):
            try:
                results += _all_model_results(await client.overview(), own)
            except Unavailable:
                raise
            except FleetError as failure:
                is_key = isinstance(failure, Unauthenticated | PermissionDenied)
                advice = "set FLEET_API_KEY to a valid key" if is_key else "connect to a coordinator"
                results.append(error("endpoint", f"ListModels failed: {failure.message}", advice))
            results[:0] = [await _health_result(endpoint, channel), await _contract_result(channel)]
    except TimeoutError:
        raise Unavailable(f"{endpoint} gave no answer within {_SECONDS:g} s") from None
    finally:
        await channel.close()
    return results


async def _health_result(endpoint: str, channel: grpc.aio.Channel) -> Result:
    """Check the health of the server, of GenerationService and of Submit."""
    check: grpc.aio.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    states: dict[str, str] = {}
    for name in ("", _SERVICE, _SUBMIT):
        try:
            reply = await check(health_pb2.HealthCheckRequest(service=name))
        except grpc.aio.AioRpcError as failure:
            states[name] = failure.code().name
        else:
            states[name] = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    if states[""] != "SERVING" or states[_SERVICE] != "SERVING":
        shown = ", ".join(f"{name or 'server'} {state}" for name, state in states.items())
        advice = "check the coordinator's log: its store is unavailable, or it is shutting down"
        return error("endpoint", f"{endpoint} answers, but is not ready: {shown}", advice)
    if states[_SUBMIT] == "NOT_SERVING":
        advice = "raise the store's maxmemory, or wait until results have expired"
        return warning("endpoint", f"{endpoint} is ready, but refuses new requests: its store is full", advice)
    return ok("endpoint", f"{endpoint} is ready")


async def _contract_result(channel: grpc.aio.Channel) -> Result:
    """Compare the fleet's public API, read by server reflection, with the API of this installation."""
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=_SERVICE)
    reflect: grpc.aio.StreamStreamMultiCallable[
        reflection_pb2.ServerReflectionRequest, reflection_pb2.ServerReflectionResponse
    ]
    reflect = channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    theirs: dict[str, FileDescriptorProto] = {}
    try:
        async for reply in reflect(iter([request])):
            for data in reply.file_descriptor_response.file_descriptor_proto:
                file = FileDescriptorProto.FromString(data)
                theirs[file.name] = file
    except grpc.aio.AioRpcError as failure:
        advice = "connect to a coordinator, not to a gateway without server reflection"
        return warning("contract", f"the API cannot be read: {from_rpc_error(failure).message}", advice)
    return contract_result(elements_of(theirs.values()), elements_of(own_files()))


def contract_result(theirs: Mapping[str, str], ours: Mapping[str, str]) -> Result:
    """Compare two versions of the API, each a mapping of names to types. See elements_of()."""
    if not theirs:
        return error("contract", f"the endpoint has no {_SERVICE}", "give the address of a coordinator")
    if changed := [name for name in ours if name in theirs and theirs[name] != ours[name]]:
        advice = "use a client of the fleet's release"
        return error("contract", f"the fleet has another type for {_named(changed)}", advice)
    if lacking := [name for name in ours if name not in theirs]:
        found = f"the fleet is older than this client: it lacks {_named(lacking)}"
        return warning("contract", found, "update the fleet, or install its release here")
    if further := [name for name in theirs if name not in ours]:
        return ok("contract", f"the fleet is newer and compatible with this client; it adds {_named(further)}")
    return ok("contract", f"same API as this installation: {len(ours)} fields and methods")


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def own_files() -> list[FileDescriptorProto]:
    """The proto file of the public API and its imports, from this installation."""
    found: dict[str, FileDescriptorProto] = {}
    waiting: list[FileDescriptor] = [generation_pb2.DESCRIPTOR]
    while waiting:
        each = waiting.pop()
        if each.name not in found:
            found[each.name] = FileDescriptorProto.FromString(each.serialized_pb)
            waiting += each.dependencies
    return list(found.values())


def elements_of(files: Iterable[FileDescriptorProto]) -> dict[str, str]:
    """Map full names of fields to number and type, and full names of methods to input and output."""
    found: dict[str, str] = {}
    for file in files:
        if file.package.startswith("fleet."):
            for message in file.message_type:
                found |= _fields(f"{file.package}.{message.name}", message)
            for service in file.service:
                for method in service.method:
                    kind = (
                        f"{method.input_type} {method.client_streaming} {method.output_type} {method.server_streaming}"
                    )
                    found[f"{file.package}.{service.name}.{method.name}"] = kind
    return found


def _fields(name: str, message: DescriptorProto) -> dict[str, str]:
    found = {
        f"{name}.{field.name}": f"{field.number} {field.label} {field.type} {field.type_name}"
        for field in message.field
    }
    for nested in message.nested_type:
        found |= _fields(f"{name}.{nested.name}", nested)
    return found


def _all_model_results(overview: generation_pb2.ListModelsResponse, own: Mapping[str, str]) -> Iterator[Result]:
    for model in overview.models:
        yield from model_results(model, own.get(model.name, ""))


def model_results(model: generation_pb2.Model, own_fingerprint: str) -> Iterator[Result]:
    """Results for a served model. `own_fingerprint`: fingerprint of the local checkpoint, or empty."""
    name = f"model {model.name}"
    without = [each.service for each in model.services if not each.workers]
    if without:
        advice = "start workers, unless autoscaling starts them at the first request"
        yield warning(name, f"no worker serves {', '.join(without)}: requests wait for a worker", advice)
    else:
        workers = ", ".join(f"{each.service} {each.workers}" for each in model.services)
        yield ok(name, f"live workers: {workers}")
    if own_fingerprint and own_fingerprint != model.fingerprint:
        yield error(
            name,
            f"the fleet serves checkpoint {model.fingerprint[:12]}, but --model is {own_fingerprint[:12]}: "
            "the fleet refuses workers with the latter",
            "use one checkpoint on all hosts",
        )
    for refused in model.refused_workers:
        service, worker, moment, reason = refused_cells(refused)
        advice = "run that worker with the checkpoint and release of the fleet"
        yield warning(name, f"worker {worker} of {service} was refused at {moment} UTC: {reason}", advice)
    for each in model.services:
        for misfit in each.incompatible_workers:
            advice = "run workers and coordinators of one release, or of two consecutive ones"
            yield warning(name, f"worker {plain(misfit.worker_id)} is incompatible: {plain(misfit.reason)}", advice)
        for package in each.kernels:
            if package.error:
                kernel, version, state = kernel_cells(package)
                advice = f"reinstall {kernel} on those workers, or uninstall it"
                yield warning(name, f"workers of {each.service}: {kernel} {version} is {state}", advice)
    for variant in model.variants:
        if variant.error:
            advice = "add the missing modules if requests need the variant"
            yield warning(name, f"variant {variant.name} is not served: {variant.error}", advice)
