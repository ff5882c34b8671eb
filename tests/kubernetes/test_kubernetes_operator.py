"""What the chart makes for the Prometheus operator, as an API server with the operator's own definitions takes it, or
does not. That the rules are rules of Prometheus is asked of promtool in the tests of the chart."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chart import CHART, helm, kinds, objects
from chart import template as rendered
from cluster import Answer, Cluster, Document, defined, operator_definitions

pytestmark = pytest.mark.full
NAMESPACE = "by-operator"
KINDS = ("ServiceMonitor", "PrometheusRule", "AlertmanagerConfig")
GROUP = "/apis/monitoring.coreos.com"


def release(*arguments: str) -> list[Document]:
    values = ["-f", str(CHART / "ci" / "operator-values.yaml"), *arguments]
    return objects(rendered(helm(), "-n", NAMESPACE, "--no-hooks", *values))


def one(kind: str, *arguments: str) -> Document:
    (found,) = kinds(release("--set", "fullnameOverride=other", *arguments), kind)
    return found


@pytest.fixture(scope="module")
def operated(cluster: Cluster) -> Iterator[Cluster]:
    """With the definitions, and all objects of the release."""
    with defined(cluster, operator_definitions()):
        cluster.namespace(NAMESPACE)
        for item in release():
            if item["metadata"].get("namespace") == NAMESPACE:
                cluster.create(item, strict=True)
        yield cluster


def kept(cluster: Cluster, kind: str, version: str = "v1") -> Document:
    listed = cluster.call("GET", f"{GROUP}/{version}/namespaces/{NAMESPACE}/{kind}")
    (found,) = listed["items"]
    item: Document = found
    return item


def test_the_monitor_is_taken_and_leads_to_a_port_of_the_service(operated: Cluster) -> None:
    monitor = kept(operated, "servicemonitors")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    services = operated.call("GET", f"/api/v1/namespaces/{NAMESPACE}/services")["items"]
    chosen = [s for s in services if wanted.items() <= s["metadata"]["labels"].items()]
    (service,) = chosen
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {p["name"] for p in service["spec"]["ports"]}
    assert monitor["metadata"]["labels"]["release"] == "kube-prometheus-stack"


def test_the_rules_are_taken_whole(operated: Cluster) -> None:
    (made,) = kinds(release(), "PrometheusRule")
    assert kept(operated, "prometheusrules")["spec"] == made["spec"], "nothing was pruned or defaulted"


def test_the_receiver_is_taken_and_leads_to_the_service(operated: Cluster) -> None:
    spec = kept(operated, "alertmanagerconfigs", "v1alpha1")["spec"]
    (receiver,) = spec["receivers"]
    assert spec["route"]["receiver"] == receiver["name"]
    (webhook,) = receiver["webhookConfigs"]
    # These two are checked by the operator's own admission webhook only, not by the definition.
    assert webhook["url"].startswith(("http://", "https://"))
    assert all(
        re.fullmatch("[0-9]+[smh]", spec["route"][name]) for name in ("groupWait", "groupInterval", "repeatInterval")
    )
    host, _, port = webhook["url"].removesuffix("/webhook").partition("://")[2].partition(":")
    name, namespace, _ = host.split(".")
    service = operated.call("GET", f"/api/v1/namespaces/{namespace}/services/{name}")
    assert int(port) in {p["port"] for p in service["spec"]["ports"]}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("ServiceMonitor", {"serviceMonitor.interval": "500ms"}),
        ("ServiceMonitor", {"serviceMonitor.interval": "2h"}),
        ("ServiceMonitor", {"serviceMonitor.tokenSecret": ""}),
        ("ServiceMonitor", {"serviceMonitor.tokenSecret": "a.b-c", "serviceMonitor.tokenKey": "of_read.1"}),
        ("AlertmanagerConfig", {"alertmanagerConfig.tokenSecret": "a.b-c", "service.port": "80"}),
        ("PrometheusRule", {"prometheusRule.labels.role": "alert-rules"}),
    ],
)
def test_what_the_values_allow_is_taken(operated: Cluster, kind: str, values: dict[str, str]) -> None:
    given = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    operated.create(one(kind, *given), dry_run=True, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_that_is_none_is_refused_by_the_server_too(operated: Cluster, kind: str) -> None:
    """The chart's schema refuses it before."""
    item = one(kind)
    item["metadata"]["labels"]["release"] = "two words"
    with pytest.raises(Answer, match="two words") as refused:
        operated.create(item, dry_run=True, strict=True)
    assert refused.value.status == 422


def _interval(spec: Any) -> None:
    spec["endpoints"][0]["interval"] = "30"


def _scheme(spec: Any) -> None:
    spec["endpoints"][0]["scheme"] = "tcp"


def _port_by_number(spec: Any) -> None:
    spec["endpoints"][0]["port"] = 9095


def _unselective(spec: Any) -> None:
    del spec["selector"]


def _misspelt(spec: Any) -> None:
    spec["endpoint"] = spec.pop("endpoints")


def _for(spec: Any) -> None:
    spec["groups"][0]["rules"][0]["for"] = "5 minutes"


def _nameless(spec: Any) -> None:
    del spec["groups"][0]["name"]


def _twice(spec: Any) -> None:
    spec["groups"].append(spec["groups"][0])


def _no_expression(spec: Any) -> None:
    del spec["groups"][0]["rules"][0]["expr"]


def _resolved(spec: Any) -> None:
    spec["receivers"][0]["webhookConfigs"][0]["sendResolved"] = "yes"


def _anonymous(spec: Any) -> None:
    del spec["receivers"][0]["name"]


def _snake(spec: Any) -> None:
    spec["route"]["group_by"] = spec["route"].pop("groupBy")  # as Alertmanager's own file has it


def _bearer(spec: Any) -> None:
    spec["receivers"][0]["webhookConfigs"][0]["httpConfig"]["authorization"]["credentials"] = "token"


@pytest.mark.parametrize(
    ("kind", "spoil", "word"),
    [
        ("ServiceMonitor", _interval, "interval"),
        ("ServiceMonitor", _scheme, "scheme"),
        ("ServiceMonitor", _port_by_number, "port"),
        ("ServiceMonitor", _unselective, "selector"),
        ("ServiceMonitor", _misspelt, "endpoint"),
        ("PrometheusRule", _for, "for"),
        ("PrometheusRule", _nameless, "name"),
        ("PrometheusRule", _twice, "groups"),
        ("PrometheusRule", _no_expression, "expr"),
        ("AlertmanagerConfig", _resolved, "sendResolved"),
        ("AlertmanagerConfig", _anonymous, "name"),
        ("AlertmanagerConfig", _snake, "group_by"),
        ("AlertmanagerConfig", _bearer, "credentials"),
    ],
)
def test_a_template_that_went_wrong_would_be_refused(
    operated: Cluster, kind: str, spoil: Callable[[Any], None], word: str
) -> None:
    item = one(kind)
    operated.create(item, dry_run=True, strict=True)
    spoil(item["spec"])
    with pytest.raises(Answer, match=word) as refused:
        operated.create(item, dry_run=True, strict=True)
    assert refused.value.status in (400, 422)
