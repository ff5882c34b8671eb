"""Which object stands above a pod: by series, by the API server's facts, and where nobody can tell."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rules.model import Alert, Evidence, Fact, Frame, SeriesId, Situation
from rules.owners import JOBS, MOUNTS, NODES, PODS, SETS, Owners, owner_queries, parts


def series(name: str, *rows: dict[str, str]) -> Evidence:
    ids = tuple(SeriesId.of(name, row) for row in rows)
    return Evidence(name, "prometheus", Frame(np.array([0.0]), ids, np.ones((len(ids), 1))))


def situation(*evidence: Evidence, **labels: str) -> Situation:
    alert = Alert(tenant="", fingerprint="f", status="firing", labels=labels, starts_at=0.0, digest="d")
    return Situation((alert,), "", 0.0, 1.0, evidence)


def owned(pod: str, kind: str, name: str) -> dict[str, str]:
    return {"namespace": "shop", "pod": pod, "owner_kind": kind, "owner_name": name}


SET = {"namespace": "shop", "replicaset": "cart-6d", "owner_kind": "Deployment", "owner_name": "cart"}
CHAIN = (series(PODS, owned("cart-6d-x", "ReplicaSet", "cart-6d")), series(SETS, SET))


def test_a_pod_belongs_to_the_deployment_of_its_replica_set() -> None:
    assert Owners(situation(*CHAIN)).of("pod/shop/cart-6d-x") == "deployment/shop/cart"


def test_a_pod_of_which_nothing_is_known_is_its_own_object() -> None:
    assert Owners(situation()).of("pod/shop/alone") == "pod/shop/alone"


def test_a_static_pod_belongs_to_no_node() -> None:
    found = Owners(situation(series(PODS, owned("etcd-a", "Node", "a"))))
    assert found.of("pod/shop/etcd-a") == "pod/shop/etcd-a"


def test_the_api_server_knows_better_than_metrics() -> None:
    fact = Fact("kubernetes.pod", "pod/shop/cart-6d-x", "", {"owner": "deployment/shop/other"})
    both = Owners(situation(*CHAIN, Evidence("kubernetes.objects", "kubernetes", facts=(fact,))))
    assert both.of("pod/shop/cart-6d-x") == "deployment/shop/other"


def test_a_target_of_pods_with_two_owners_has_none() -> None:
    one, two = owned("a-0", "StatefulSet", "a"), owned("b-0", "StatefulSet", "b")
    assert Owners(situation(series(PODS, one), job="x")).of("target/x") == "statefulset/shop/a"
    assert Owners(situation(series(PODS, one, two), job="x")).of("target/x") == ""


def test_a_claim_that_nobody_mounts_is_its_own_object() -> None:
    mount = {"namespace": "shop", "pod": "db-0", "persistentvolumeclaim": "data"}
    pods = series(PODS, owned("db-0", "StatefulSet", "db"))
    claim = "persistentvolumeclaim/shop/data"
    assert Owners(situation(pods, series(MOUNTS, mount))).of(claim) == "statefulset/shop/db"
    assert Owners(situation(pods)).of(claim) == claim


def test_an_instance_is_the_node_that_has_its_address() -> None:
    found = Owners(situation(series(NODES, {"node": "a", "internal_ip": "10.0.0.7"})))
    assert found.of("instance/10.0.0.7:9100") == found.of("instance/a") == found.of("node/a") == "node/a"
    assert found.of("instance/10.0.0.8:9100") == ""


def test_a_cluster_a_queue_and_an_unknown_service_are_no_objects() -> None:
    found = Owners(situation(*CHAIN))
    assert [found.of(node) for node in ("cluster/x", "queue/x", "alert/x", "cart")] == [""] * 4
    assert owner_queries("cluster/x", {"cluster": "x"}) == owner_queries("orders", {"service": "orders"}) == ()


def test_an_action_is_pointed_at_workloads_and_nodes_only() -> None:
    assert dict(parts("deployment/shop/cart")) == {"kind": "deployment", "namespace": "shop", "name": "cart"}
    assert dict(parts("node/a")) == {"node": "a"}
    assert not any(dict(parts(path)) for path in ("cronjob/shop/x", "resourcequota/shop/x", "namespace/shop", ""))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), max_size=9))
def test_chains_end_whatever_series_say(pairs: list[tuple[str, str]]) -> None:
    rows = [{"namespace": "n", "job_name": a, "owner_kind": "Job", "owner_name": b} for a, b in pairs]
    assert Owners(situation(series(JOBS, *rows))).of("kubejob/n/a").startswith("job/n/")
