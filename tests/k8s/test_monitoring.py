"""Every expression of rules and dashboard selects existing metrics; every alert has a runbook."""

from __future__ import annotations

import monitoring
import pytest
from manifests import K8S
from promql import errors_of, recorded_labels, selectors_of

_ALL = [
    *monitoring.rule_queries("alert"),
    *monitoring.rule_queries("record"),
    *monitoring.dashboard_queries(service="denoising"),
    *monitoring.variable_metrics(),
]


@pytest.mark.parametrize("query", _ALL, ids=lambda query: query.place)
def test_an_expression_selects_existing_metrics(query: monitoring.Query) -> None:
    assert "$" not in query.expression.replace("$labels", "")
    assert selectors_of(query.expression)
    assert not list(errors_of(query.expression, monitoring.recorded()))


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("rate(fleet_request_total[5m]) > 0", "fleet_request_total is not a metric"),
        ("fleet_queue_wait_seconds > 0", "fleet_queue_wait_seconds is not a metric"),
        ('max(fleet_queue_length{stage="a"})', "fleet_queue_length has no label stage"),
        ('max(fleet_queue_length{service="a"})', "service of fleet_queue_length is never a"),
        ('model:fleet:rate5m{service="a"}', "model:fleet:rate5m has no label service"),
        ("model:fleet:rate1m", "model:fleet:rate1m is not a metric"),
        ('{__name__=~"fleet_.*"}', "a selector without a name"),
    ],
)
def test_a_wrong_expression_is_found(expression: str, error: str) -> None:
    assert any(error in each for each in errors_of(expression, {"model:fleet:rate5m"}))


def test_an_unparsable_expression_is_an_error() -> None:
    with pytest.raises(ValueError, match="unclosed"):
        selectors_of("sum(rate(fleet_requests_total[5m])")


def test_the_name_of_a_recorded_metric_lists_its_labels() -> None:
    assert recorded_labels("service_model_work:fleet_step_seconds:p50_rate5m") == {"service", "model", "work"}
    assert recorded_labels("grpc_method:grpc_server_call_errors:ratio_rate5m") == {"grpc_method"}


def test_each_alert_has_a_severity_a_summary_and_a_runbook() -> None:
    alerts = monitoring.rules("alert")
    names = [rule["alert"] for rule in alerts]
    assert len(set(names)) == len(names) > 10
    for rule in alerts:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        document, anchor = monitoring.runbook(rule)
        assert anchor == rule["alert"].lower()
        assert anchor in monitoring.anchors(document), f"{document} has no heading {rule['alert']}"


def test_each_runbook_belongs_to_an_alert() -> None:
    """A renamed alert must not leave its old runbook."""
    section = (K8S / "README.md").read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]
    headings = [line.removeprefix("### ") for line in section.splitlines() if line.startswith("### ")]
    assert headings == [rule["alert"] for rule in monitoring.rules("alert")]


def test_each_alert_has_a_rule_test() -> None:
    text = monitoring.RULE_TESTS.read_text()
    assert not [rule["alert"] for rule in monitoring.rules("alert") if f"alertname: {rule['alert']}\n" not in text]


def test_the_dashboard_has_rows_for_stages_store_and_gpus() -> None:
    rows = {panel["title"]: panel for panel in monitoring.dashboard()["panels"] if panel["type"] == "row"}
    assert list(rows) == ["Requests", "Stage $service", "Store", "GPUs"]
    assert rows["Stage $service"]["repeat"] == "service"
    assert [query.place for query in monitoring.variable_metrics()] == ["variable model", "variable service"]


def test_latency_quantile_panels_show_exemplars() -> None:
    """Recorded metrics have no exemplars, so quantile panels query the histograms."""
    targets = [target for panel in monitoring.dashboard()["panels"] for target in panel.get("targets", [])]
    shown = [target["expr"] for target in targets if target.get("exemplar") is True]
    assert len(shown) > 5
    assert shown == [target["expr"] for target in targets if "_seconds_bucket" in target["expr"]]


def test_each_panel_has_a_unit_and_a_unique_id_and_position() -> None:
    panels = monitoring.dashboard()["panels"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in panels if panel["type"] != "row")
