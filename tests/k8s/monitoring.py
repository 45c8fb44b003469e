"""Rules and dashboard of k8s/components/monitoring: expressions, and the runbook of each alert."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from manifests import K8S, ROOT

FOLDER = K8S / "components" / "monitoring"
RULE_TESTS = Path(__file__).parent / "rule_tests.yaml"


class Query(NamedTuple):
    """An expression and its location."""

    place: str
    expression: str


def rule_groups() -> list[dict[str, Any]]:
    """Groups of the PrometheusRule, in the format of Prometheus rule files."""
    rule = yaml.safe_load((FOLDER / "rules.yaml").read_text(encoding="utf-8"))
    groups: list[dict[str, Any]] = rule["spec"]["groups"]
    return groups


def rules(kind: str) -> list[dict[str, Any]]:
    """Rules with a field `kind`: "alert" or "record"."""
    return [rule for group in rule_groups() for rule in group["rules"] if kind in rule]


def rule_queries(kind: str) -> list[Query]:
    """Expressions of the rules of a kind."""
    return [Query(f"{kind} {rule[kind]}", rule["expr"]) for rule in rules(kind)]


def recorded() -> frozenset[str]:
    """Names of recorded metrics."""
    return frozenset(rule["record"] for rule in rules("record"))


def dashboard() -> dict[str, Any]:
    """The Grafana dashboard."""
    loaded: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
    return loaded


def dashboard_queries(*, service: str, rate_interval: str = "1m") -> list[Query]:
    """Expressions of all panels, with Grafana's variables replaced by all models and one service."""
    values = {"$__rate_interval": rate_interval, "$service": service, "$model": ".+"}
    queries = []
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in values.items():
                expression = expression.replace(name, value)
            queries.append(Query(f"panel {panel['title']}", expression))
    return queries


def variable_metrics() -> Iterator[Query]:
    """Metrics whose label values fill the dashboard's variables."""
    for variable in dashboard()["templating"]["list"]:
        for metric, label in re.findall(r"label_values\((\w+), (\w+)\)", str(variable["query"])):
            yield Query(f"variable {variable['name']}", f'{metric}{{{label}=~".+"}}')


def anchors(document: Path) -> set[str]:
    """Anchors of a Markdown file's headings, as GitHub generates them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def runbook(rule: dict[str, Any]) -> tuple[Path, str]:
    """File and anchor of an alert's runbook."""
    path, _, anchor = rule["annotations"]["runbook"].partition("#")
    return ROOT / path, anchor
