"""Parses PromQL: the selectors of an expression, and selectors that no exported series can match."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import promql_parser

from common import metrics
from metric_table import series
from services.cli.serve import service_names

_TARGET_LABELS = frozenset({"instance", "job", "namespace", "pod"})
"""Labels that Prometheus adds to the series of a target."""
_VALUES = {
    "service": frozenset(service_names()),
    "begun": frozenset({"yes", "no"}),
    "reason": frozenset({"lost", "handed_over", "full"}),
    "result": frozenset({"hit", "miss", "failed", "stored", "ok", "error", "cancelled"}),
}
"""All values of a label; any value is possible for a label without an entry."""


class Selector(NamedTuple):
    """A selector of an expression: metric, and matchers as (label, is equality, value)."""

    metric: str
    matchers: tuple[tuple[str, bool, str], ...]


def selectors_of(expression: str) -> list[Selector]:
    """Selectors of an expression. Raises ValueError if Prometheus could not parse it."""
    found: list[Selector] = []

    def visit(node: object) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            equal = promql_parser.MatchOp.Equal
            matchers = tuple((each.name, each.op == equal, each.value) for each in node.matchers.matchers)
            found.append(Selector(node.name or "", matchers))
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def errors_of(expression: str, recorded: Collection[str] = ()) -> Iterator[str]:
    """Errors of an expression: unknown metrics, unknown labels, and impossible label values."""
    known = series()
    for metric, matchers in selectors_of(expression):
        if metric in recorded:
            labels = recorded_labels(metric)
        elif metric in known:
            labels = known[metric] | _TARGET_LABELS
        else:
            yield f"{metric or 'a selector without a name'} is not a metric of the fleet"
            continue
        for label, must_equal, value in matchers:
            if label not in labels:
                yield f"{metric} has no label {label}"
            elif must_equal and value not in _VALUES.get(label, {value}):
                yield f"{label} of {metric} is never {value}"


def recorded_labels(record: str) -> frozenset[str]:
    """Labels of a recorded metric, from the level in its name: service_model:… has service and model."""
    level = f"_{record.partition(':')[0]}_"
    return frozenset(each for each in metrics.LABELS if f"_{each}_" in level)
