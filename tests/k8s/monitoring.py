"""The rules and the dashboard of k8s/components/monitoring: their expressions, and the runbook of each alert."""

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
    """An expression, and where it stands."""

    place: str
    expression: str


def rule_groups() -> list[dict[str, Any]]:
    """The groups of the PrometheusRule, in the form of Prometheus' own rule files."""
    rule = yaml.safe_load((FOLDER / "rules.yaml").read_text(encoding="utf-8"))
    groups: list[dict[str, Any]] = rule["spec"]["groups"]
    return groups


def rules(kind: str) -> list[dict[str, Any]]:
    """The rules that have a field `kind`: alert or record."""
    return [rule for group in rule_groups() for rule in group["rules"] if kind in rule]


def rule_queries(kind: str) -> list[Query]:
    """The expressions of rules."""
    return [Query(f"{kind} {rule[kind]}", rule["expr"]) for rule in rules(kind)]


def recorded() -> frozenset[str]:
    """The metrics that rules record."""
    return frozenset(rule["record"] for rule in rules("record"))


def dashboard() -> dict[str, Any]:
    """The Grafana dashboard."""
    loaded: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
    return loaded


def dashboard_queries(*, service: str, rate_interval: str = "1m") -> list[Query]:
    """The expressions of all panels with Grafana's variables replaced: all models, and one service."""
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
    """The metrics whose labels fill the dashboard's variables."""
    for variable in dashboard()["templating"]["list"]:
        for metric, label in re.findall(r"label_values\((\w+), (\w+)\)", str(variable["query"])):
            yield Query(f"variable {variable['name']}", f'{metric}{{{label}=~".+"}}')


def anchors(document: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def runbook(rule: dict[str, Any]) -> tuple[Path, str]:
    """The file and the anchor of an alert's runbook."""
    path, _, anchor = rule["annotations"]["runbook"].partition("#")
    return ROOT / path, anchor
