"""Check that all queries of rules and dashboard return data: `python tests/fleet/run_monitoring.py`.

`promtool` checks the rules and runs their tests. Prometheus then scrapes a fleet of the emoji model on this host while
requests run. Each recording rule must return a number, each panel a number for at least one service, and each alert
must be valid. Queries of the metrics in EXEMPT may return no data on a host without a GPU. After 1,000 requests of 50
callers, the number of series must not have grown. All processes export traces, and each histogram of EXEMPLARS must
have an exemplar with the trace id of a request. Requires `prometheus` and `promtool` (Debian package prometheus).

The exit status is 1 if a check failed; findings are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "proto"), str(TESTS / "k8s")]
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # grpc reads the variable at import

import monitoring  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from promql import selectors_of  # noqa: E402

from common.rpc.client import open_channel  # noqa: E402
from common.state.records import State  # noqa: E402
from fleet.v1 import generation_pb2 as pb  # noqa: E402
from fleet.v1 import generation_pb2_grpc  # noqa: E402
from otlp_receiver import receiving  # noqa: E402
from redis_servers import running_server  # noqa: E402
from services.cli.up_flags import free_port  # noqa: E402

EXEMPT = ("fleet_gpu_memory_used_bytes", "fleet_gpu_memory_total_bytes", "fleet_gpu_utilization_ratio")
"""GPU metrics. Queries of these metrics may return no data on a host without a GPU."""

EXEMPLARS = ("fleet_request_duration_seconds", "fleet_stage_seconds", "grpc_server_call_duration_seconds")
"""Histograms of coordinators and workers. Clients send no traceparent: coordinators start the traces."""

_SERVICES = ("text_encoding", "latent_preparation", "denoising", "decoding")
_SETTINGS = {
    "text_encoding": ("--reply-cache-redis-bytes", "100000000", "--reply-cache-redis-gain", "0"),
    "denoising": ("--step-checkpoint-every", "1"),
}
_CALLERS = 50
_CONCURRENT_REQUESTS = 8
_WAIT_SECONDS = 90.0
_START_SECONDS = 120.0
_TARGETS = 1 + len(_SERVICES)


class Prometheus:
    """A Prometheus server that scrapes ports of this host and evaluates the rules every second."""

    def __init__(self, directory: Path, ports: Sequence[int]) -> None:
        self._address = f"127.0.0.1:{free_port(0)}"
        self._began = time.time()
        rules = directory / "rules.yaml"
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [
                {"job_name": "fleet", "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}]}
            ],
        }
        (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self.command = [
            "prometheus",
            f"--config.file={directory / 'prometheus.yaml'}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address={self._address}",
            "--enable-feature=exemplar-storage",
        ]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The current samples of an expression. Raises ValueError for an invalid expression."""
        data = urllib.parse.urlencode({"query": expression}).encode()
        try:
            with urllib.request.urlopen(f"http://{self._address}/api/v1/query", data) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            if error.code == HTTPStatus.SERVICE_UNAVAILABLE:  # Prometheus is starting
                raise
            raise ValueError(f"{expression}: {error.read().decode()}") from error
        samples: list[dict[str, Any]] = answer["data"]["result"]
        return samples

    def has_number(self, expression: str) -> bool:
        """Whether a sample is a number; quantiles of empty histograms are NaN."""
        return any(not math.isnan(float(sample["value"][1])) for sample in self.query(expression))

    def series_count(self) -> int:
        """Number of current series of the fleet's processes, without histogram buckets."""
        (sample,) = self.query('count({__name__=~"(fleet|grpc)_.*", __name__!~".*_bucket", job="fleet"})')
        return int(sample["value"][1])

    def exemplar_traces(self, histogram: str) -> set[str]:
        """Trace ids of the exemplars of a histogram."""
        query = {"query": f"{histogram}_bucket", "start": str(self._began), "end": str(time.time() + 1)}
        path = f"/api/v1/query_exemplars?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(f"http://{self._address}{path}") as reply:
            series = json.load(reply)["data"]
        return {exemplar["labels"]["trace_id"] for each in series for exemplar in each["exemplars"]}

    def failed_rules(self) -> list[str]:
        """Rules whose last evaluation failed, and the errors."""
        with urllib.request.urlopen(f"http://{self._address}/api/v1/rules") as reply:
            groups = json.load(reply)["data"]["groups"]
        return [
            f"{rule['name']}: {rule['lastError']}" for each in groups for rule in each["rules"] if "lastError" in rule
        ]

    def is_scraping(self) -> bool:
        """Whether the last scrape of every process succeeded."""
        try:
            return len(self.query("up == 1")) == _TARGETS
        except urllib.error.URLError:
            return False


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in the block, with its output in a file."""
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environ) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


def write_rules(directory: Path) -> None:
    """Write the rules and their tests in the format of promtool."""
    (directory / "rules.yaml").write_text(yaml.safe_dump({"groups": monitoring.rule_groups()}))
    shutil.copy(monitoring.RULE_TESTS, directory)


def check_rules(directory: Path) -> list[str]:
    """Errors that promtool reports for the rules."""
    findings = []
    for arguments in (("check", "rules", "rules.yaml"), ("test", "rules", monitoring.RULE_TESTS.name)):
        completed = subprocess.run(["promtool", *arguments], cwd=directory, capture_output=True, text=True, check=False)
        if completed.returncode:
            findings.append(f"promtool {' '.join(arguments)}:\n{completed.stdout}{completed.stderr}")
    return findings


def write_callers(path: Path) -> list[str]:
    """Write the API keys file; returns the keys."""
    keys = [f"key-of-caller-{number:03}" for number in range(_CALLERS)]
    digests = (hashlib.sha256(key.encode()).hexdigest() for key in keys)
    path.write_text("".join(f'[callers.caller{n:03}]\nkey_sha256 = ["{each}"]\n' for n, each in enumerate(digests)))
    return keys


async def run_requests(
    endpoint: str, numbers: range, keys: Sequence[str], steps: int, traces: set[str] | None = None
) -> list[str]:
    """Run requests with different prompts and seeds; returns findings about failed requests.

    Trace ids of the requests are added to `traces`.
    """
    queue = iter(numbers)
    findings: list[str] = []
    async with open_channel(endpoint) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)

        async def client() -> None:
            for number in queue:
                metadata = (("authorization", f"Bearer {keys[number % len(keys)]}"),)
                parameters = pb.GenerationParameters(
                    prompt=f"a red apple {number // 2}", seed=number, num_inference_steps=steps
                )
                submitted = await stub.Submit(pb.SubmitRequest(parameters=parameters), metadata=metadata)
                request_id = submitted.request.request_id
                if traces is not None:
                    traces.add(submitted.request.trace.traceparent.split("-")[1])
                state = 0
                async for response in stub.Watch(pb.WatchRequest(request_id=request_id), metadata=metadata):
                    state = response.event.state_change.state or state
                if state != State.REQUEST_STATE_SUCCEEDED:
                    findings.append(f"request {number} ended in state {state}")

        await asyncio.gather(*(client() for _ in range(_CONCURRENT_REQUESTS)))
    return findings


def wait_until(condition: str, is_true: Any, seconds: float) -> None:
    """Poll `is_true` until it returns true. Raises TimeoutError with the text of the condition."""
    give_up = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > give_up:
            raise TimeoutError(f"{condition}: not true within {seconds:g} s")
        time.sleep(0.2)


def needs_gpu(expression: str) -> bool:
    """Whether an expression uses a metric of EXEMPT."""
    return any(selector.metric in EXEMPT for selector in selectors_of(expression))


def queries_without_data(prometheus: Prometheus, *, has_gpu: bool) -> list[str]:
    """Queries without data, of recording rules, panels and variables.

    If a metric of the alerts has no data, only that metric is returned. Raises ValueError for an invalid alert.
    """
    for query in monitoring.rule_queries("alert"):
        prometheus.query(query.expression)
    for selector in [each for query in monitoring.rule_queries("alert") for each in selectors_of(query.expression)]:
        if not (selector.metric in EXEMPT and not has_gpu) and not prometheus.query(selector.metric):
            return [f"alerts: {selector.metric}"]
    expressions = {(f"record {name}", 0): [name] for name in sorted(monitoring.recorded())}
    expressions |= {(query.place, 0): [query.expression] for query in monitoring.variable_metrics()}
    for service in _SERVICES:
        for number, query in enumerate(monitoring.dashboard_queries(service=service, rate_interval="5m")):
            expressions.setdefault((query.place, number), []).append(query.expression)
    return [
        f"{place}: {alternatives[0]}"
        for (place, _), alternatives in expressions.items()
        if not (needs_gpu(alternatives[0]) and not has_gpu) and not any(map(prometheus.has_number, alternatives))
    ]


def check_exemplars(prometheus: Prometheus, traces: set[str]) -> list[str]:
    """Findings about histograms without an exemplar of one of the traces."""
    return [f"{each}: no exemplar of a request" for each in EXEMPLARS if not traces & prometheus.exemplar_traces(each)]


def check_fleet(directory: Path, redis_url: str, requests: int, stack: contextlib.ExitStack) -> list[str]:
    """Start the fleet and Prometheus, run requests and evaluate the queries; returns findings."""
    receiver = stack.enter_context(receiving())
    tracing = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint}
    keys = write_callers(directory / "keys.toml")
    endpoint = f"unix:{directory}/coordinator.sock"
    ports: list[int] = []
    for service in ("coordinator", *_SERVICES):
        ports.append(free_port(0))
        flags = _SETTINGS.get(service, ())
        if service == "coordinator":
            flags = ("--api-keys", str(directory / "keys.toml"), "--heartbeat-seconds", "0.3", "--step-seconds", "10")
        listen = ("--listen", f"unix:{directory}/{service}.sock", "--metrics-port", str(ports[-1]))
        command = (sys.executable, "-m", "services.cli", "serve", service, *listen, "--redis", redis_url, *flags)
        stack.enter_context(running(command, directory / f"{service}.log", tracing))
    prometheus = Prometheus(directory, ports)
    stack.enter_context(running(prometheus.command, directory / "prometheus.log"))
    wait_until("all processes are scraped", prometheus.is_scraping, _START_SECONDS)
    traces: set[str] = set()
    findings = asyncio.run(run_requests(endpoint, range(20), keys[:1], steps=4, traces=traces))
    has_gpu = torch.cuda.is_available()
    began = time.monotonic()
    while (missing := queries_without_data(prometheus, has_gpu=has_gpu)) and time.monotonic() - began < _WAIT_SECONDS:
        findings += asyncio.run(run_requests(endpoint, range(20), keys[:1], steps=4, traces=traces))
    findings += check_exemplars(prometheus, traces)
    findings += [f"no data: {each}" for each in missing] + prometheus.failed_rules()
    if not missing:
        sys.stdout.write(f"each query has data after {time.monotonic() - began:.1f} s; GPU queries: {has_gpu}\n")
    before = prometheus.series_count()
    findings += asyncio.run(run_requests(endpoint, range(requests), keys, steps=1))
    time.sleep(3)  # three scrapes
    after = prometheus.series_count()
    sys.stdout.write(f"series before and after {requests} requests of {_CALLERS} callers: {before}, {after}\n")
    if after > before:
        findings.append(f"{requests} requests created {after - before} new series")
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks and print findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--requests", type=int, default=1_000, help="number of requests that must not create series (default: 1,000)"
    )
    args = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(prefix="fleet-mon-"))
    write_rules(directory)
    findings = check_rules(directory)
    with running_server("valkey") as server, contextlib.ExitStack() as stack:
        findings += check_fleet(directory, server.url, args.requests, stack)
    if findings:
        sys.stdout.write("\n".join((f"findings (logs are in {directory}):", *findings, "")))
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
