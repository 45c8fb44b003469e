"""The flags of `fleet up`."""

from __future__ import annotations

import argparse
import math
import socket
from collections.abc import Sequence
from typing import Any

from common.errors import InvalidInput
from common.settings import FlagParser, SettingsError
from models.catalog import DEFAULT_MODEL, ServedModel
from services.cli.options import DEGREES, command_parser
from services.cli.parameters import number, whole_number
from services.cli.replica_policy import ReplicaBounds

_MOST_REPLICAS = 64
_IDLE_SECONDS = 60.0
_TARGET_SECONDS = 10.0
_HEADROOM = 0.0
_AUTOSCALING = ("max_replicas", "idle_seconds", "target_seconds", "headroom")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Raises SettingsError."""
    parser = command_parser("up", "Run a whole fleet on this host, one process per service, until Ctrl-C.")
    parser.add_argument(
        "--model", action="append", metavar="DIR|NAME", help=f"model to serve, repeatable (default: {DEFAULT_MODEL})"
    )
    parser.add_argument(
        "--port",
        type=whole_number,
        default=50051,
        metavar="P",
        help="port on 127.0.0.1; 0: any free port (default: 50051)",
    )
    parser.add_argument(
        "--replicas",
        action="append",
        default=[],
        metavar="SERVICE=N",
        help="number of workers of a service, per model (default: 1); repeatable",
    )
    parser.add_argument(
        "--scaler-port",
        type=whole_number,
        metavar="P",
        help="port of KEDA's external scaler on 127.0.0.1; 0: any free port (default: none)",
    )
    _add_autoscaling(parser)
    parser.add_argument("--redis", metavar="URL", help="request store (default: embedded, discarded at the end)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the computation")
    for axis in DEGREES:
        parser.add_argument(
            f"--{axis}", type=whole_number, metavar="N", help=f"{axis} degree of denoising, for a worker group"
        )
    args = parser.parse_args(argv)
    for name in ("port", "scaler_port"):
        if not 0 <= (vars(args)[name] or 0) < 65536:
            flag = "--" + name.replace("_", "-")
            raise SettingsError(f"{flag}: {vars(args)[name]} is not from 0 to 65535; 0 works", field=name)
    _check_autoscaling(args)
    return args


def _add_autoscaling(parser: FlagParser) -> None:
    group = parser.add_argument_group("autoscaling")
    group.add_argument(
        "--autoscale",
        action="store_true",
        help="start workers on demand, and stop idle ones; --replicas is then the minimum (default: 0)",
    )
    group.add_argument(
        "--max-replicas",
        action="append",
        metavar="SERVICE=N",
        help="maximum workers of a service, per model (default: 1, since workers share the host's memory); repeatable",
    )
    group.add_argument(
        "--idle-seconds",
        type=number,
        metavar="S",
        help=f"seconds until workers without demand are stopped (default: {_IDLE_SECONDS:g})",
    )
    group.add_argument(
        "--target-seconds",
        type=number,
        metavar="S",
        help=f"target of wanted_seconds per worker (default: {_TARGET_SECONDS:g})",
    )
    group.add_argument(
        "--headroom",
        type=number,
        metavar="X",
        help=f"spare workers of a service: X times the square root of the workers in demand (default: {_HEADROOM:g})",
    )


def _check_autoscaling(args: argparse.Namespace) -> None:
    """Refuse autoscaling flags without --autoscale and numbers out of range; set the defaults. Raises SettingsError."""
    for name in _AUTOSCALING:
        if vars(args)[name] is not None and not args.autoscale:
            flag = "--" + name.replace("_", "-")
            raise SettingsError(f"{flag} is used only with --autoscale; add --autoscale", field=name)
    args.max_replicas = args.max_replicas or []
    args.idle_seconds = _IDLE_SECONDS if args.idle_seconds is None else args.idle_seconds
    args.target_seconds = _TARGET_SECONDS if args.target_seconds is None else args.target_seconds
    args.headroom = _HEADROOM if args.headroom is None else args.headroom
    _check_from_zero("idle_seconds", args.idle_seconds, works=60)
    _check_from_zero("headroom", args.headroom, works=1)
    if not (math.isfinite(args.target_seconds) and args.target_seconds > 0):
        raise SettingsError(
            f"--target-seconds: {args.target_seconds:g} is not a number above 0; 10 works", field="target_seconds"
        )


def _check_from_zero(name: str, value: float, *, works: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        flag = "--" + name.replace("_", "-")
        raise SettingsError(f"{flag}: {value:g} is not a number of at least 0; {works:g} works", field=name)


def service_counts(field: str, texts: Sequence[str], models: Sequence[ServedModel]) -> dict[str, int]:
    """Parse the SERVICE=N values of a flag. Raises InvalidInput."""
    known = list(dict.fromkeys(spec.service for model in models for spec in model.services))
    counts: dict[str, int] = {}
    for text in texts:
        service, _, count = text.partition("=")
        if service not in known or not (count.isascii() and count.isdecimal() and 0 < int(count) <= _MOST_REPLICAS):
            raise InvalidInput(
                f"--{field.replace('_', '-')}: {text!r} is not SERVICE=N with N from 1 to {_MOST_REPLICAS} and SERVICE "
                f"one of {', '.join(known)}; {known[0]}=1 works",
                field=field,
            )
        counts[service] = int(count)
    return counts


def replica_bounds(args: argparse.Namespace, models: Sequence[ServedModel]) -> dict[str, ReplicaBounds]:
    """Minimum and maximum workers of each service; equal without --autoscale."""
    replicas = service_counts("replicas", args.replicas, models)
    most = service_counts("max_replicas", args.max_replicas, models)
    bounds: dict[str, ReplicaBounds] = {}
    for service in dict.fromkeys(spec.service for model in models for spec in model.services):
        least = replicas.get(service, 0 if args.autoscale else 1)
        if service in most and most[service] < least:
            raise InvalidInput(
                f"--max-replicas: {service}={most[service]} is not at least --replicas {service}={least}; "
                f"{service}={least} works",
                field="max_replicas",
            )
        bounds[service] = ReplicaBounds(least, most.get(service, max(least, 1)), args.idle_seconds)
    return bounds


def degrees(args: argparse.Namespace) -> dict[str, Any]:
    """The degrees that are set."""
    return {axis: vars(args)[axis] for axis in DEGREES if vars(args)[axis] is not None}


def free_port(port: int, flag: str = "port") -> int:
    """Check that a port can be bound, and return it; for 0, return a free port. Raises InvalidInput."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            message = f"--{flag}: cannot listen on 127.0.0.1:{port}: {error.strerror}"
            raise InvalidInput(message, field=flag) from error
        return int(probe.getsockname()[1])
