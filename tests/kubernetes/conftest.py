"""One API server for all full tests of Kubernetes, with the chart applied to it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# actions_world, anyalert_world, agent_world
sys.path.insert(0, str(Path(__file__).parents[1] / "actions"))
sys.path.insert(0, str(Path(__file__).parents[1] / "anyalert"))
sys.path.insert(0, str(Path(__file__).parents[1] / "worlds"))

from chart import CHART, helm, objects, template
from cluster import Cluster, apiserver_program

CUSTOM = {"ServiceMonitor", "PrometheusRule", "AlertmanagerConfig", "HTTPRoute"}
# Namespace of the release -> its value set.
RELEASES = {"ops": "actions", "wide": "cluster", "plain": "default", "single": "one-action", "doctor": "diagnose"}


def apply(cluster: Cluster, namespace: str, values: str) -> None:
    """What `helm install` would create, hooks left out."""
    arguments = ["-f", str(CHART / "ci" / f"{values}-values.yaml")] if values != "default" else []
    for item in objects(template(helm(), "-n", namespace, "--no-hooks", *arguments)):
        if item["kind"] not in CUSTOM:
            cluster.create(item)


@pytest.fixture(scope="session")
def cluster(program: Callable[..., str]) -> Iterator[Cluster]:
    made = Cluster(Path(tempfile.mkdtemp(prefix="am-k8s-")), program("etcd", "etcd-server"), apiserver_program())
    try:
        made.start()
        for namespace in ("shop", "payments"):
            made.namespace(namespace)
        for namespace, values in RELEASES.items():
            made.namespace(namespace, **{"pod-security.kubernetes.io/enforce": "restricted"})
            apply(made, namespace, values)
        yield made
    finally:
        made.close()
