"""Check of the OTEL_ variables: whether spans are exported, and whether the collector accepts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from common.tracing import ENDPOINTS, EXPORTER, NotExported, collector_url, is_wanted, load_exporter
from services.cli.doctor_results import Result, ok, warning

COLLECTOR_SECONDS = 3


def check_traces(environ: Mapping[str, str] = os.environ) -> Iterator[Result]:
    """Check that spans are exported if traces are enabled. Yields no errors, because services run without traces."""
    if not is_wanted(environ):
        given = sorted(name for name in (*ENDPOINTS, EXPORTER) if environ.get(name))
        switch = "OTEL_SDK_DISABLED" if environ.get("OTEL_SDK_DISABLED") else EXPORTER
        reason = f"{switch} disables traces" if given else f"none of {', '.join((*ENDPOINTS, EXPORTER))} is set"
        yield ok("traces", f"not exported: {reason}")
        return
    found = load_exporter("doctor", environ)
    if isinstance(found, NotExported):
        yield warning("traces", f"not exported: {found.reason}", found.advice)
        return
    url = collector_url(environ)
    try:
        is_taken = found.reaches_collector(COLLECTOR_SECONDS)
    finally:
        found.close()
    if is_taken:
        yield ok("traces", f"the collector at {url} accepts spans")
    else:
        yield warning(
            "traces",
            f"the collector at {url} accepts no spans: services run, but drop their spans",
            f"start the collector, or correct {ENDPOINTS[1]}, its certificate and headers",
        )
