"""Generates the tables of metrics in services/README.md. `python tests/metric_table.py` updates them."""

from __future__ import annotations

import textwrap

from prometheus_client.metrics import MetricWrapperBase

from common import metrics
from generated_part import GeneratedPart, markdown
from readme import ROOT

README = ROOT / "services" / "README.md"
PART = GeneratedPart(README, "<!-- metrics: `poe metrics` writes these tables -->\n", "<!-- end of metrics -->\n")

_WIDTH = 130
_SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("_sum", "_count"),
}


def all_metrics() -> list[MetricWrapperBase]:
    """The fleet's metrics in order of definition."""
    return [each for each in vars(metrics).values() if isinstance(each, MetricWrapperBase)]


def labels_of(metric: MetricWrapperBase) -> tuple[str, ...]:
    """Label names of a metric."""
    labels: tuple[str, ...] = vars(metric)["_labelnames"]
    return labels


def series() -> dict[str, frozenset[str]]:
    """Names of the stored series with their labels; a histogram has several series."""
    found: dict[str, frozenset[str]] = {}
    for each in all_metrics():
        (family,) = each.describe()
        for suffix in _SUFFIXES[family.type]:
            le = {"le"} if suffix == "_bucket" else set()
            found[f"{family.name}{suffix}"] = frozenset({*labels_of(each), *le})
    return found


def table() -> str:
    """The Markdown tables of metrics and labels, and notes."""
    rows = [("Metric", "Type", "Labels", "Meaning"), ("---",) * 4]
    for each in all_metrics():
        (family,) = each.describe()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(f"`{label}`" for label in labels_of(each))
        rows.append((f"`{name}`", family.type, labels or "none", family.documentation))
    rules = [("Label", "Values"), ("---",) * 2]
    rules += [(f"`{name}`", rule) for name, rule in metrics.LABELS.items()]
    return "\n".join((markdown(rows), markdown(rules), *(f"{textwrap.fill(note, _WIDTH)}\n" for note in metrics.NOTES)))


if __name__ == "__main__":
    PART.write(table())
