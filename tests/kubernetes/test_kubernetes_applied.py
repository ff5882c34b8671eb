"""Value sets really applied, hooks included: what must fit together does, as the API server keeps it."""

from __future__ import annotations

from typing import Any

import pytest
from chart import CHART, helm, objects
from chart import template as rendered
from cluster import Cluster, Document

pytestmark = pytest.mark.full
FOREIGN = {"ServiceMonitor", "PrometheusRule", "AlertmanagerConfig", "HTTPRoute"}  # no definitions of them here


def applied(cluster: Cluster, namespace: str, values: str) -> dict[str, list[Document]]:
    """The objects of the release's namespace as the server has kept them, by kind."""
    cluster.namespace(namespace, **{"pod-security.kubernetes.io/enforce": "restricted"})
    named = ["--set", f"fullnameOverride={namespace}", "--set", "serviceAccount.create=true"]
    found: dict[str, list[Document]] = {}
    for item in objects(rendered(helm(), "-n", namespace, *named, "-f", str(CHART / "ci" / f"{values}-values.yaml"))):
        if item["kind"] not in FOREIGN and item["metadata"].get("namespace") == namespace:
            found.setdefault(item["kind"], []).append(cluster.create(item))
    return found


@pytest.fixture(scope="module")
def ingress(cluster: Cluster) -> dict[str, list[Document]]:
    return applied(cluster, "by-ingress", "ingress")


def test_the_ingress_leads_to_a_port_of_the_service(ingress: dict[str, list[Document]]) -> None:
    (entry,) = ingress["Ingress"]
    services = {s["metadata"]["name"]: s for s in ingress["Service"]}
    for rule in entry["spec"]["rules"]:
        for path in rule["http"]["paths"]:
            backend = path["backend"]["service"]
            ports = services[backend["name"]]["spec"]["ports"]
            assert any(backend["port"] in ({"name": p["name"]}, {"number": p["port"]}) for p in ports)


def test_the_network_policy_selects_the_agent_and_not_the_test_hook(ingress: dict[str, list[Document]]) -> None:
    (agent,) = ingress["StatefulSet"]
    labels = agent["spec"]["template"]["metadata"]["labels"]
    (hook,) = ingress["Pod"]
    for policy in ingress["NetworkPolicy"]:
        wanted: dict[str, Any] = policy["spec"]["podSelector"]["matchLabels"]
        assert wanted.items() <= labels.items()
        assert not wanted.items() <= hook["metadata"]["labels"].items()


def test_the_test_hook_is_admitted_and_asks_the_service(ingress: dict[str, list[Document]]) -> None:
    """By the restricted standard, which is enforced in the namespace."""
    (hook,) = ingress["Pod"]
    assert hook["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = hook["spec"]["containers"]
    asked = container["args"][0]
    assert any(
        f"://{s['metadata']['name']}:{p['port']}/" in asked for s in ingress["Service"] for p in s["spec"]["ports"]
    )


def test_the_service_selects_the_agents_pods_and_not_the_hook(ingress: dict[str, list[Document]]) -> None:
    (agent,) = ingress["StatefulSet"]
    (hook,) = ingress["Pod"]
    for service in ingress["Service"]:
        selector = service["spec"]["selector"].items()
        assert selector <= agent["spec"]["template"]["metadata"]["labels"].items()
        assert not selector <= hook["metadata"]["labels"].items()


def test_gke_gets_what_its_writable_cgroups_need(cluster: Cluster) -> None:
    (agent,) = applied(cluster, "on-gke", "gke")["StatefulSet"]
    pod = agent["spec"]["template"]
    name = pod["spec"]["containers"][0]["name"]
    assert pod["metadata"]["annotations"][f"node.gke.io/enable-writable-cgroups.{name}"] == "true"
    assert pod["spec"]["nodeSelector"] == {"node.gke.io/enable-writable-cgroups": "true"}
    resources = pod["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
