"""`fleet doctor`: checks this host, a checkpoint, the request store and a running fleet."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from common.settings import SettingsError
from services.cli.access import access_of
from services.cli.doctor_checkpoint import SECONDS as MODEL_SECONDS
from services.cli.doctor_checkpoint import check_memory, check_model, fingerprints
from services.cli.doctor_endpoint import check_endpoint, check_proxies
from services.cli.doctor_gpu import SECONDS as GPU_SECONDS
from services.cli.doctor_gpu import GpuFacts, check_attention, check_gpus, check_kernels, read_gpu_facts
from services.cli.doctor_packages import check_packages, check_python, has_worker_extra
from services.cli.doctor_ports import check_endpoint_ports
from services.cli.doctor_redis import redis_checks
from services.cli.doctor_results import Check, CheckStatus, Result, run_checks
from services.cli.doctor_settings import COORDINATOR, ServiceSource, check_ports, check_settings
from services.cli.doctor_tls import TlsFiles, check_service_tls, check_tls
from services.cli.doctor_traces import check_traces
from services.cli.options import add_endpoint, command_parser, endpoint_of
from services.cli.serve import service_names

_STYLES = {CheckStatus.OK: "green", CheckStatus.WARNING: "yellow", CheckStatus.ERROR: "red"}
_INSTALL = "install diffusion-fleet with pip: its metadata states the version bounds"
_READ = "check that the files and devices of this host can be read"
_TORCH = "repair or reinstall torch and the kernel packages, or name working ones in kernels"


def main(argv: Sequence[str]) -> int:
    """Print one line per result; exit code 0 if all results are OK, 1 with warnings, 2 with errors."""
    args = _arguments(argv)
    shows_tracebacks = os.environ.get("FLEET_LOG_LEVEL") == "DEBUG"
    if not shows_tracebacks:
        # Discards warnings that the checked modules log, because the results report the same problems.
        logging.getLogger().addHandler(logging.NullHandler())
    results = []
    console = Console(highlight=False, soft_wrap=True)
    for result in run_checks(checks_of(args), shows_tracebacks=shows_tracebacks):
        results.append(result)
        if not args.json:
            console.print(line_of(result))
    worst = max((each.status for each in results), default=CheckStatus.OK)
    if args.json:
        report = {"status": worst.name.lower(), "results": [each.as_json() for each in results]}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return worst.value


def line_of(result: Result) -> Text:
    """The line of a result: status, name, finding and, after an arrow, the advice."""
    advice = f" -> {result.advice}" if result.advice else ""
    state = Text(f"{result.status.name.lower():9}", style=_STYLES[result.status])
    return state + Text(f"{result.name:<17} {result.found}{advice}")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags, with variables such as FLEET_REDIS as defaults. Raises SettingsError."""
    parser = command_parser(
        "doctor",
        "Check this host, a checkpoint, the request store and a running fleet; exit code 1: warnings, 2: errors.",
    )
    parser.add_argument(
        "--model", action="append", metavar="DIR|NAME", help="checkpoint to check, repeatable (default: FLEET_MODEL)"
    )
    parser.add_argument("--redis", metavar="URL", help="request store to check (default: FLEET_REDIS)")
    parser.add_argument(
        "--service",
        metavar="SERVICE",
        help=f"service of this host whose settings are checked (default: {COORDINATOR})",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file with settings of that service (default: FLEET_CONFIG)"
    )
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    add_endpoint(parser, "FLEET_ENDPOINT, else no fleet is checked")
    args = parser.parse_args(argv)
    args.redis = args.redis or os.environ.get("FLEET_REDIS") or ""
    models = os.environ.get("FLEET_MODEL", "").split(",")
    args.model = args.model or [each.strip() for each in models if each.strip()]
    args.endpoint = endpoint_of(args.endpoint) if args.endpoint or os.environ.get("FLEET_ENDPOINT") else ""
    if args.service is not None and args.service not in service_names():
        known = ", ".join(service_names())
        raise SettingsError(f"--service: {args.service!r} is not a service; services are {known}", field="service")
    return args


def checks_of(args: argparse.Namespace, read_gpus: Callable[[Sequence[str]], GpuFacts] = read_gpu_facts) -> list[Check]:
    """The checks for the arguments, in output order. `read_gpus` receives the flags of the worker settings."""
    source = ServiceSource(args.service or COORDINATOR, args.config or "", args.redis)
    facts = cache(lambda: read_gpus(_kernel_flags(source.values)))
    checks = [
        Check("python", check_python, _INSTALL),
        Check("packages", check_packages, _INSTALL),
        Check("settings", lambda: check_settings(source), "correct that variable, key or file", seconds=60.0),
        Check("ports", lambda: check_ports(source, args.endpoint), _READ, needs="settings"),
        Check("tls", lambda: _tls_results(source, args), _READ),
        Check("traces", check_traces, "correct the OTEL_ variables, or unset them"),
        Check("proxies", lambda: check_proxies(args.endpoint), _READ),
    ]
    if has_worker_extra():
        checks += [
            Check("gpu", lambda: check_gpus(facts(), source.values.get("device", "auto")), _TORCH, GPU_SECONDS + 10),
            Check("kernels", lambda: check_kernels(facts()), _TORCH, needs="gpu"),
            Check("attention", lambda: check_attention(facts()), _TORCH, needs="gpu"),
        ]
    for reference in args.model:
        checks += _model_checks(reference, facts, source)
    if args.redis:
        checks += redis_checks(args.redis, lambda: source.store, lambda: source.values)
    if args.endpoint:
        advice = "check the coordinator's log, --endpoint, --tls, --tls-ca and --api-key"

        def ask() -> Iterable[Result]:
            return check_endpoint(args.endpoint, access_of(args), fingerprints(args.model))

        checks.append(Check("endpoint", ask, advice, seconds=60.0))
        if source.service == COORDINATOR:

            def ask_ports() -> Iterable[Result]:
                return check_endpoint_ports(args.endpoint, source.values)

            checks.append(Check("endpoint ports", ask_ports, advice, needs="endpoint"))
    return checks


def _model_checks(reference: str, facts: Callable[[], GpuFacts], source: ServiceSource) -> Iterator[Check]:
    """The checks of a checkpoint, and of its memory use if the worker extra is installed."""
    yield Check("checkpoint", lambda: check_model(reference), f"check that {reference} can be read", MODEL_SECONDS)
    if has_worker_extra():
        yield Check(
            "memory", lambda: check_memory(reference, facts(), source.values), _READ, MODEL_SECONDS, needs="gpu"
        )


def _kernel_flags(values: Mapping[str, Any]) -> list[str]:
    """The worker flags that select the kernel packages to try. Empty for a service without kernel settings."""
    flags = [argument for package in values.get("kernels", ()) for argument in ("--kernels", package)]
    return [*flags, "--attention-backend", values["attention_backend"]] if "attention_backend" in values else flags


def _tls_results(source: ServiceSource, args: argparse.Namespace) -> Iterator[Result]:
    """Results for the TLS files of the service settings and of this command's flags."""
    yield from check_service_tls(source.values, args.service or "")
    cert, key, ca = (Path(path) if (path := vars(args)[name]) else None for name in ("tls_cert", "tls_key", "tls_ca"))
    if cert or key or ca:
        yield from check_tls([TlsFiles("tls", cert, key, ca)])
