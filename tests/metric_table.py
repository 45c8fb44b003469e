"""Writes the tables of metrics in services/README.md. `python tests/metric_table.py` updates them."""

from __future__ import annotations

from prometheus_client.metrics import MetricWrapperBase

from common import metrics
from readme import ROOT

README = ROOT / "services" / "README.md"
BEGIN, END = "<!-- metrics: `poe metrics` writes these tables -->\n", "<!-- end of metrics -->\n"

_SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("_sum", "_count"),
}


def all_metrics() -> list[MetricWrapperBase]:
    """The metrics of the fleet in the order of their definition."""
    return [each for each in vars(metrics).values() if isinstance(each, MetricWrapperBase)]


def labels_of(metric: MetricWrapperBase) -> tuple[str, ...]:
    """The names of a metric's labels."""
    labels: tuple[str, ...] = vars(metric)["_labelnames"]
    return labels


def series() -> dict[str, frozenset[str]]:
    """The names under which series are stored, such as those of a histogram, with their labels."""
    found: dict[str, frozenset[str]] = {}
    for each in all_metrics():
        (family,) = each.describe()
        for suffix in _SUFFIXES[family.type]:
            le = {"le"} if suffix == "_bucket" else set()
            found[f"{family.name}{suffix}"] = frozenset({*labels_of(each), *le})
    return found


def table() -> str:
    """The tables of metrics and labels in Markdown."""
    rows = [("Metric", "Type", "Labels", "Meaning"), ("---",) * 4]
    for each in all_metrics():
        (family,) = each.describe()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(f"`{label}`" for label in labels_of(each))
        rows.append((f"`{name}`", family.type, labels or "none", family.documentation))
    rules = [("Label", "Values"), ("---",) * 2]
    rules += [(f"`{name}`", rule) for name, rule in metrics.LABELS.items()]
    return "\n".join("".join(f"| {' | '.join(cells)} |\n" for cells in each) for each in (rows, rules))


def replaced(text: str, new: str) -> str:
    """The README's text with other tables. Raises ValueError for a text without the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"services/README.md: {BEGIN.strip()} and {END.strip()} are not both in it")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(replaced(README.read_text(), table()))
