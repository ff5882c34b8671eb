"""The chart's HTTPRoute as an API server with the Gateway API's own definitions takes it, or does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chart import CHART, helm, kinds, objects
from chart import template as rendered
from cluster import Answer, Cluster, Document, defined, gateway_definitions

pytestmark = pytest.mark.full
GROUP = "/apis/gateway.networking.k8s.io/v1"
NAMESPACE = "by-gateway"


def release(*arguments: str) -> list[Document]:
    values = ["-f", str(CHART / "ci" / "gateway-values.yaml"), *arguments]
    return objects(rendered(helm(), "-n", NAMESPACE, "--no-hooks", *values))


def route(*arguments: str) -> Document:
    (found,) = kinds(release(*arguments), "HTTPRoute")
    return found


def with_values(values: Document) -> Document:
    """A route of another name, for dry runs beside the one that is kept."""
    given = json.dumps({"enabled": True, "hostnames": [], **values})
    return route("--set", "fullnameOverride=other", "--set-json", f"gateway={given}")


@pytest.fixture(scope="module")
def gateways(cluster: Cluster) -> Iterator[Cluster]:
    """With the definitions, a gateway, and the release's other objects."""
    with defined(cluster, gateway_definitions()):
        for namespace in (NAMESPACE, "gateways"):
            cluster.namespace(namespace)
        for item in release():
            if item["kind"] != "HTTPRoute" and item["metadata"].get("namespace") == NAMESPACE:
                cluster.create(item)
        listener = {"name": "https", "port": 443, "protocol": "HTTPS", "hostname": "*.example.com",
                    "tls": {"certificateRefs": [{"name": "wildcard"}]},
                    "allowedRoutes": {"namespaces": {"from": "All"}}}  # fmt: skip
        create(cluster, {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
                         "metadata": {"name": "public", "namespace": "gateways"},
                         "spec": {"gatewayClassName": "any", "listeners": [listener]}})  # fmt: skip
        yield cluster


def create(cluster: Cluster, item: Document, *, dry_run: bool = False) -> Document:
    return cluster.create(item, dry_run=dry_run, strict=True)


def test_the_route_is_taken_and_leads_from_the_gateway_to_the_service(gateways: Cluster) -> None:
    kept = create(gateways, route())
    assert kept["spec"]["hostnames"] == ["medic.example.com"]
    (parent,) = kept["spec"]["parentRefs"]
    assert (parent["group"], parent["kind"]) == ("gateway.networking.k8s.io", "Gateway"), "the definition's defaults"
    gateway = gateways.call("GET", f"{GROUP}/namespaces/{parent['namespace']}/gateways/{parent['name']}")
    assert gateway["metadata"]["name"] == "public"
    (rule,) = kept["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    assert backend["kind"] == "Service"
    service = gateways.call("GET", f"/api/v1/namespaces/{NAMESPACE}/services/{backend['name']}")
    assert backend["port"] in {p["port"] for p in service["spec"]["ports"]}, "a route names the service's port"
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/"}}]


PUBLIC = {"name": "public", "namespace": "gateways"}


@pytest.mark.parametrize(
    "values",
    [
        {"parentRefs": [PUBLIC]},
        {"parentRefs": [PUBLIC], "hostnames": ["*.example.com", "medic.internal"]},
        {"parentRefs": [{"name": "public", "namespace": "gateways", "sectionName": "https", "port": 443}]},
        {"parentRefs": [{"name": "a"}, {"name": "b"}]},
        {"parentRefs": [{"name": "mesh", "kind": "Service", "group": ""}]},
    ],
)
def test_what_the_values_allow_is_taken(gateways: Cluster, values: dict[str, Any]) -> None:
    create(gateways, with_values(values), dry_run=True)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"parentRefs": [{"name": "public", "port": 70000}]}, "port"),
        ({"parentRefs": [{"name": "public", "gateway": "public"}]}, "gateway"),
        ({"parentRefs": [{"name": "public"}, {"name": "public"}]}, "sectionName"),
        ({"parentRefs": [{"name": "public", "namespace": "Not_A_Namespace"}]}, "namespace"),
    ],
)
def test_values_that_are_wrong_are_refused_by_the_server(gateways: Cluster, values: dict[str, Any], word: str) -> None:
    item = with_values(values)
    with pytest.raises(Answer, match=word) as refused:
        create(gateways, item, dry_run=True)
    assert refused.value.status in (400, 422)


def _hostname(spec: Document) -> None:
    spec["hostnames"] = ["https://medic.example.com"]


def _portless(spec: Document) -> None:
    del spec["rules"][0]["backendRefs"][0]["port"]


def _misspelt(spec: Document) -> None:
    spec["parentRef"] = spec.pop("parentRefs")


def _port_by_name(spec: Document) -> None:
    spec["rules"][0]["backendRefs"][0]["port"] = "http"  # as an Ingress would have it


@pytest.mark.parametrize(
    ("spoil", "word"),
    [(_hostname, "hostnames"), (_portless, "port"), (_misspelt, "parentRef"), (_port_by_name, "port")],
)
def test_a_template_that_went_wrong_would_be_refused(
    gateways: Cluster, spoil: Callable[[Document], None], word: str
) -> None:
    item = with_values({"parentRefs": [PUBLIC]})
    create(gateways, item, dry_run=True)
    spoil(item["spec"])
    with pytest.raises(Answer, match=word) as refused:
        create(gateways, item, dry_run=True)
    assert refused.value.status in (400, 422)
