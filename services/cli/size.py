"""`fleet size`: computes the replicas of each service for a load.

It also prints remarks on services for which a separate process is unnecessary.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from common.artifacts import ParamValue
from common.settings import SettingsError
from models.catalog import ServedModel, open_model, shipped_models
from models.registry import load_registry
from services.cli.access import Access, access_of
from services.cli.generate import plugin_directories
from services.cli.measured_requests import measure_request
from services.cli.options import SUCCESS, add_endpoint, command_parser, endpoint_of, run_async
from services.cli.parameters import number, whole_number
from services.cli.stage_seconds import (
    GroupSpeed,
    Measurement,
    Shape,
    Transport,
    group_device,
    group_speeds,
    measurements,
    transport,
)
from services.cli.status_cells import table

_LITTLE = 0.2
"""Utilization of a worker below which its service can share the device of another service."""

_TRANSPORT_SHARE = 0.02
"""Transport time, as a fraction of the compute time of a request, above which a remark is printed."""

_DENOISING = "denoising"
_ON_CPU = frozenset({"latent_preparation"})
_AXES = ("height", "width", "num_frames")
_GROUP_AXES = ("tp", "ulysses", "ring", "cfg")


@dataclass(frozen=True)
class Load:
    """The load of a fleet. `seconds` maps services, in pipeline order, to the compute seconds of one request.

    `utilization` is the target for each worker. `ranks` is the number of GPUs per denoising worker.
    """

    requests_per_second: float
    utilization: float
    seconds: Mapping[str, float]
    ranks: int = 1

    def devices(self, size: ServiceSize) -> int:
        """Number of devices of all workers of a service."""
        return size.replicas * (self.ranks if size.service == _DENOISING else 1)


@dataclass(frozen=True)
class ServiceSize:
    """Replicas of a service, each with one request at a time, and their utilization (0 to 1)."""

    service: str
    seconds: float
    replicas: int
    utilization: float


def main(argv: Sequence[str]) -> int:
    """Print the table and its remarks; returns the exit code."""
    args = _arguments(argv)
    given = _stage_seconds(args.stage_seconds)
    if args.endpoint is not None:
        measured, source = _measured_at(endpoint_of(args.endpoint), access_of(args), args)
    else:
        measured, source = _committed(args, given)
    if unknown := sorted(given.keys() - measured.keys()):
        raise SettingsError(
            f"--stage-seconds: {unknown[0]!r} is not a service of {args.model}; services are {', '.join(measured)}",
            field="stage-seconds",
        )
    if missing := [service for service, seconds in measured.items() if service not in given and seconds is None]:
        raise SettingsError(
            f"--stage-seconds: no measurement of {', '.join(missing)} of {args.model}; give "
            f"{' '.join(f'--stage-seconds {each}=SECONDS' for each in missing)}, or --endpoint of a running fleet",
            field="stage-seconds",
        )
    seconds = {service: given.get(service, each or 0.0) for service, each in measured.items()}
    load = Load(
        args.requests_per_second, args.utilization, seconds, 1 if args.degrees is None else _ranks(args.degrees)
    )
    sys.stdout.write("".join(f"{line}\n" for line in _report(load, source, transport())))
    return SUCCESS


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("size", "Estimate the replicas of each service for a load.")
    published = ", ".join(measurements())
    parser.add_argument(
        "--model", required=True, metavar="DIR|NAME", help=f"directory, shipped model, or one of {published}"
    )
    parser.add_argument("--requests-per-second", required=True, type=number, metavar="X", help="mean request rate")
    parser.add_argument("--size", metavar="HxW[xF]", help="height, width and frames (default: the model's)")
    parser.add_argument("--steps", type=whole_number, metavar="N", help="denoising steps (default: the model's)")
    parser.add_argument(
        "--utilization",
        "--utilisation",
        type=number,
        default=0.7,
        metavar="U",
        help="target utilization of each worker (default: 0.7)",
    )
    parser.add_argument(
        "--stage-seconds",
        action="append",
        default=[],
        metavar="SERVICE=SECONDS",
        help="compute seconds of one request at a service, instead of the committed measurement; repeatable",
    )
    parser.add_argument(
        "--degrees",
        metavar="AXIS=N[,...]",
        help="parallel degrees of each denoising worker, such as ring=2 or tp=2,cfg=2 (default: one GPU)",
    )
    add_endpoint(parser, "none; committed measurements are used")
    args = parser.parse_args(argv)
    for name, most in (("requests_per_second", math.inf), ("utilization", 1.0)):
        value = vars(args)[name]
        if not (math.isfinite(value) and 0 < value <= most):
            flag, rule = "--" + name.replace("_", "-"), f"above 0 and at most {most:g}" if most == 1 else "above 0"
            raise SettingsError(f"{flag}: {value:g} is not a number {rule}; 0.7 works", field=name)
    if args.steps is not None and args.steps < 1:
        raise SettingsError(f"--steps: {args.steps} is not at least 1; 28 works", field="steps")
    args.size = _size(args.size) if args.size is not None else None
    args.degrees = _degrees(args.degrees) if args.degrees is not None else None
    return args


def _degrees(text: str) -> str:
    """Normalize degrees: sort them in the order of _GROUP_AXES, and remove degrees of 1. Raises SettingsError."""
    degrees: dict[str, int] = {}
    for pair in text.split(","):
        axis, _, degree = pair.partition("=")
        if axis not in _GROUP_AXES or axis in degrees or not (degree.isascii() and degree.isdecimal() and int(degree)):
            raise SettingsError(
                f"--degrees: {text!r} is not AXIS=N[,...] with axes of {', '.join(_GROUP_AXES)}; ring=2 works",
                field="degrees",
            )
        degrees[axis] = int(degree)
    return ",".join(f"{axis}={degrees[axis]}" for axis in _GROUP_AXES if degrees.get(axis, 1) > 1)


def _ranks(degrees: str) -> int:
    """Number of GPUs of a worker group."""
    return math.prod(int(pair.partition("=")[2]) for pair in degrees.split(",") if pair)


def _size(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if not (len(parts) in (2, 3) and all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts)):
        raise SettingsError(f"--size: {text!r} is not HxW or HxWxF; 1024x1024 works", field="size")
    return tuple(int(part) for part in parts)


def _stage_seconds(pairs: Sequence[str]) -> dict[str, float]:
    """Seconds by service, from the flags. Raises SettingsError for a malformed or repeated pair."""
    given: dict[str, float] = {}
    for pair in pairs:
        service, _, text = pair.partition("=")
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not (service and math.isfinite(seconds) and seconds > 0):
            raise SettingsError(
                f"--stage-seconds: {pair!r} is not SERVICE=SECONDS, above 0; denoising=3.4 works", field="stage-seconds"
            )
        if service in given:
            raise SettingsError(f"--stage-seconds: {service} is given twice; once works", field="stage-seconds")
        given[service] = seconds
    return given


Seconds = Mapping[str, float | None]
"""Seconds of one request by service, in pipeline order; None for a service without a measurement."""


def _measured_at(endpoint: str, access: Access, args: argparse.Namespace) -> tuple[Seconds, str]:
    """Measure a request of this size on a running fleet."""
    parameters = dict(zip(_AXES, args.size or (), strict=False)) | (
        {"num_inference_steps": args.steps} if args.steps is not None else {}
    )
    measured: dict[str, float] = {}

    async def measure() -> int:
        measured.update(await measure_request(endpoint, access, args.model, parameters))
        return SUCCESS

    run_async(measure())
    return measured, f"measured with one request at {endpoint}, after a warm-up request"


def _committed(args: argparse.Namespace, given: Mapping[str, float]) -> tuple[Seconds, str]:
    """Scale the committed measurement of the model, or of a model with its architecture, to the request."""
    if args.model in measurements() and args.model not in shipped_models():
        measurement = measurements()[args.model]
        size, steps = args.size or measurement.size, args.steps or measurement.steps
        if len(size) != len(measurement.size):
            example = "x".join(map(str, measurement.size))
            raise SettingsError(
                f"--size: {'x'.join(map(str, size))} is not a size of {args.model}; {example} works", field="size"
            )
        shape = Shape(math.prod(size), steps, measurement.shape.branches)
        return _scaled_to(measurement, measurement.seconds, shape, given, args.degrees)
    model = open_model(args.model, load_registry(plugin_directories()))
    services, shape = _request(model, args)
    transformer = _transformer(model)
    for measurement in measurements().values():
        if measurement.fits(model.checkpoint.pipeline_name, transformer):
            return _scaled_to(measurement, services, shape, given, args.degrees)
    return dict.fromkeys(services), "given by --stage-seconds"


def _transformer(model: ServedModel) -> Mapping[str, object]:
    return model.checkpoint.module_config("transformer") if "transformer" in model.checkpoint.modules else {}


def _request(model: ServedModel, args: argparse.Namespace) -> tuple[tuple[str, ...], Shape]:
    """Services and shape of a request, for the first variant without required images, else the first."""
    given: dict[str, ParamValue] = {"prompt": ""}
    given |= dict(zip(_AXES, args.size or (), strict=False))
    if args.steps is not None:
        given["num_inference_steps"] = args.steps
    variant = next((each for each in model.variants if not each.roles.required), model.variants[0])
    params, _ = variant.sampling_params.build(given, model.checkpoint)
    pixels = math.prod(params.extent.values()) * params.num_outputs_per_prompt
    services = tuple(spec.service for spec in variant.services)
    return services, Shape(pixels, params.num_inference_steps, params.branches)


def _scaled_to(
    measurement: Measurement,
    services: Sequence[str] | Mapping[str, float],
    shape: Shape,
    given: Mapping[str, float],
    degrees: str | None,
) -> tuple[Seconds, str]:
    """Scale a measurement to a shape and to worker groups of these degrees. Returns the seconds and their source.

    Services in `given` have no seconds, because --stage-seconds sets them.
    """
    seconds: dict[str, float | None] = {
        service: measurement.seconds_of(service, shape)
        if service in measurement.seconds and service not in given
        else None
        for service in services
    }
    size = "x".join(map(str, measurement.size))
    source = (
        f"{measurement.model} on {measurement.device}, {size}, {measurement.steps} steps, scaled by pixels, steps and "
        "guidance where the request differs"
    )
    denoising = seconds.get(_DENOISING)
    if not degrees or denoising is None:
        return seconds, source
    speed = _group_speed(measurement.model, degrees, shape.pixels)
    seconds[_DENOISING] = denoising / speed.speedup
    size = "x".join(map(str, speed.size))
    group = f"a group with {degrees} is {speed.speedup:g} times as fast as one {group_device()} at {size}"
    return seconds, f"{source}; {group}"


def _group_speed(model: str, degrees: str, pixels: int) -> GroupSpeed:
    """The speed-up of a worker group at the nearest measured size. Raises SettingsError without a measurement."""
    of_model = [each for each in group_speeds() if each.model == model]
    if fitting := [each for each in of_model if each.degrees == degrees]:
        return min(fitting, key=lambda each: abs(math.log(math.prod(each.size) / pixels)))
    known = ", ".join(dict.fromkeys(each.degrees for each in of_model))
    raise SettingsError(
        f"--degrees: {degrees} is not measured for {model}; {f'{known} work, or ' if known else ''}give "
        f"--stage-seconds {_DENOISING}=SECONDS of such a group",
        field="degrees",
    )


def sizes_of(load: Load) -> list[ServiceSize]:
    """The minimum number of workers of each service that keeps their utilization at or below the target."""
    sizes = []
    for service, seconds in load.seconds.items():
        busy = load.requests_per_second * seconds
        replicas = max(1, math.ceil(busy / load.utilization - 1e-9))
        sizes.append(ServiceSize(service, seconds, replicas, busy / replicas))
    return sizes


def _report(load: Load, source: str, costs: Transport) -> Iterator[str]:
    columns: dict[str, list[str]] = {"SERVICE": [], "SECONDS": [], "REPLICAS": [], "BUSY": [], "DEVICES": []}
    for each in sizes_of(load):
        cells = (each.service, _three_digits(each.seconds), str(each.replicas), f"{each.utilization:.0%}")
        for column, cell in zip(columns.values(), (*cells, str(load.devices(each))), strict=True):
            column.append(cell)
    if load.ranks == 1:
        del columns["DEVICES"]
    yield table([*columns], [*zip(*columns.values(), strict=True)]).rstrip("\n")
    yield f"Stage seconds: {source}."
    yield from remarks(load, costs)


def _three_digits(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds >= 0.0005 else "<0.001"


def remarks(load: Load, costs: Transport) -> Iterator[str]:
    """Remarks on services for which a separate process is unnecessary."""
    sizes = [each for each in sizes_of(load) if each.service not in _ON_CPU]
    total = sum(load.seconds.values())
    split = sum(map(load.devices, sizes))
    whole = max(1, math.ceil(load.requests_per_second * sum(each.seconds for each in sizes) / load.utilization - 1e-9))
    if load.ranks == 1 and split > whole:
        yield (
            f"Separate services need {split} devices; instances of the whole pipeline need {whole}. Split only "
            "if one device cannot hold all weights, or to restart and scale each service separately."
        )
    longest = max(sizes, key=lambda each: each.seconds)
    for each in sizes:
        if each is not longest and each.replicas == 1 and each.utilization < _LITTLE:
            yield f"{each.service} uses {each.utilization:.0%} of one device: it can share another service's device."
        if each.seconds < costs.hop_seconds:
            yield (
                f"{each.service} computes for {1e3 * each.seconds:.1f} ms, less than one hop of 4 MB "
                f"({1e3 * costs.hop_seconds:.1f} ms): a separate service does not pay off."
            )
    if costs.request_seconds > _TRANSPORT_SHARE * total:
        yield (
            f"Transport takes {1e3 * costs.request_seconds:.0f} ms per request, {costs.request_seconds / total:.0%} of "
            "its compute time: separate services do not reduce the latency."
        )
