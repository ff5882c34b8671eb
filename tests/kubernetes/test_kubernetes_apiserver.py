"""The chart and every action against a real API server: applied, granted, refused, executed, verified, undone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from actions_world import MemoryLedger, Proposal, ScriptedVerifier, context, in_sandbox
from chart import CHART, helm, objects, template
from cluster import (
    Answer,
    Cluster,
    Document,
    container_status,
    controller_revision,
    path_of,
    pod,
    replica_set,
    workload,
)

import sandbox
from actions import guard
from actions.builtin import CANNOT_TELL, DONE, NOTHING_DONE
from actions.builtin.kubernetes_api import Api, ApiError, Name
from actions.catalog import load_catalog
from actions.model import Declined, Plan, Refusal, Step
from actions.runner import Runner, RunnerSettings

pytestmark = pytest.mark.full
CATALOG = load_catalog()
numbers = itertools.count(1)


@dataclass
class Hands:
    """The service account of one release, as the agent would use it."""

    cluster: Cluster
    directory: Path
    namespace: str
    namespaces: str = "shop"
    url: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def token_file(self) -> Path:
        file = self.directory / f"{self.namespace}.token"
        if not file.exists():
            file.write_text(self.cluster.token_of(self.namespace, "alertmedic"))
        return file

    @property
    def reach(self) -> dict[str, str]:
        found = {
            "kubernetes_api": self.url or self.cluster.url,
            "kubernetes_token_file": str(self.token_file),
            "kubernetes_ca_file": str(self.cluster.ca_file),
        }
        return found | ({"kubernetes_namespaces": self.namespaces} if self.namespaces else {})

    async def consider(self, action: str, service: str = "subject", **params: Any) -> Plan | Declined:
        surroundings = context(inventory={service: self.reach}, incident="inc-7", targets=(), values={})
        proposal = Proposal(action=action, service=service, params=params)
        return await guard.consider(proposal, CATALOG, surroundings, in_sandbox)

    async def plan(self, action: str, **params: Any) -> Plan:
        plan = await self.consider(action, **params)
        assert isinstance(plan, Plan), plan
        self.notes += plan.notes
        return plan

    async def declined(self, action: str, **params: Any) -> Declined:
        plan = await self.consider(action, **params)
        assert isinstance(plan, Declined), plan
        return plan


async def carry_out(plan: Plan, *, helps: bool = True) -> str:
    """Through the real runner and the real sandbox; the path of its one step."""
    ledger, verifier = MemoryLedger(), ScriptedVerifier([(helps, "the series say so")])
    runner = Runner(ledger, sandbox, verifier, lambda: plan.made_at + 1, RunnerSettings())
    outcome = await runner.run(plan, asyncio.Event())
    assert not outcome.reason.startswith("Interrupted"), outcome
    return ledger.path(0)


async def exit_code(argv: tuple[str, ...], step: Step) -> int | None:
    result = await in_sandbox(argv, step.limits)
    assert not result.error
    return result.exit_code


@pytest.fixture
def hands(cluster: Cluster, tmp_path: Path) -> Hands:
    return Hands(cluster, tmp_path, "ops")


@pytest.fixture
def fresh() -> str:
    return f"cart{next(numbers)}"


# -- the chart


def test_every_object_of_the_chart_is_accepted(cluster: Cluster) -> None:
    found = cluster.call("GET", "/apis/apps/v1/namespaces/ops/statefulsets/alertmedic")
    assert found["spec"]["replicas"] == 1


@pytest.mark.parametrize("values", sorted(p.name for p in (CHART / "ci").glob("*.yaml")))
def test_the_server_takes_every_value_set_and_its_pod_is_restricted(cluster: Cluster, values: str) -> None:
    """Dry runs: the pod goes through the admission plugin of the restricted standard, which is enforced there."""
    for item in objects(
        template(helm(), "-n", "ops", "--set", "fullnameOverride=other", "-f", str(CHART / "ci" / values))
    ):
        if item["kind"] in ("ServiceMonitor", "PrometheusRule", "AlertmanagerConfig", "HTTPRoute"):
            continue
        namespace = item["metadata"].get("namespace")
        if namespace in (None, "ops", "shop", "payments"):
            cluster.create(item, dry_run=True)
        if item["kind"] == "StatefulSet":
            made = item["spec"]["template"]
            spec = dict(made["spec"])
            if spec.pop("runtimeClassName", ""):
                assert values == "sandbox-values.yaml"
            spec.pop("priorityClassName", "")
            spec["serviceAccountName"] = "default"
            spec["volumes"].append({"name": "state", "persistentVolumeClaim": {"claimName": "state-other-0"}})
            one = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one", "namespace": "ops"}, "spec": spec}
            cluster.create(one, dry_run=True)


def test_a_privileged_pod_would_have_been_refused(cluster: Cluster) -> None:
    spec = {"containers": [{"name": "a", "image": "a", "securityContext": {"privileged": True}}]}
    item = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bad", "namespace": "ops"}, "spec": spec}
    with pytest.raises(Answer, match="violates PodSecurity"):
        cluster.create(item, dry_run=True)


# -- what is granted, and what is not


FORBIDDEN = [
    ("GET", "/api/v1/namespaces/shop/secrets"),
    ("GET", "/api/v1/namespaces/kube-system/configmaps"),
    ("GET", "/api/v1/nodes"),
    ("DELETE", "/api/v1/namespaces/shop/pods/none"),
    ("DELETE", "/apis/apps/v1/namespaces/shop/deployments/none"),
    ("POST", "/api/v1/namespaces/shop/pods"),
    ("POST", "/api/v1/namespaces/shop/pods/none/exec?command=id"),
    ("POST", "/apis/rbac.authorization.k8s.io/v1/namespaces/shop/rolebindings"),
    ("POST", "/api/v1/namespaces/ops/serviceaccounts/alertmedic/token"),
]


@pytest.mark.parametrize("release", ["ops", "plain", "single"])
@pytest.mark.parametrize(("method", "path"), FORBIDDEN)
def test_what_was_not_granted_is_forbidden(
    cluster: Cluster, tmp_path: Path, release: str, method: str, path: str
) -> None:
    token = Hands(cluster, tmp_path, release).token_file.read_text()
    with pytest.raises(Answer) as refused:
        cluster.call(method, path, {} if method == "POST" else None, token=token)
    assert refused.value.status == 403


def test_the_default_may_read_its_own_namespace_and_change_nothing(cluster: Cluster, tmp_path: Path) -> None:
    token = Hands(cluster, tmp_path, "plain").token_file.read_text()
    assert cluster.call("GET", "/api/v1/namespaces/plain/pods", token=token)["kind"] == "PodList"
    for path in ("/api/v1/namespaces/shop/pods", "/api/v1/pods", "/api/v1/namespaces/plain/configmaps"):
        with pytest.raises(Answer, match="403"):
            cluster.call("GET", path, token=token)
    for resource in ("deployments", "statefulsets", "daemonsets"):
        with pytest.raises(Answer, match="403"):
            cluster.call("PATCH", f"/apis/apps/v1/namespaces/plain/{resource}/x", {}, token=token)


def test_one_action_grants_no_other(cluster: Cluster, tmp_path: Path) -> None:
    """Only `scale` is on: it may patch workloads, and neither list nor evict nor touch autoscalers and ConfigMaps."""
    token = Hands(cluster, tmp_path, "single").token_file.read_text()
    for method, path in (
        ("GET", "/apis/apps/v1/namespaces/shop/deployments"),
        ("POST", "/api/v1/namespaces/shop/pods/x/eviction"),
        ("PATCH", "/apis/autoscaling/v2/namespaces/shop/horizontalpodautoscalers/x"),
        ("PATCH", "/apis/batch/v1/namespaces/shop/cronjobs/x"),
        ("PATCH", "/api/v1/namespaces/shop/configmaps/feature-flags"),
        ("PATCH", "/apis/apps/v1/namespaces/payments/deployments/x"),
    ):
        with pytest.raises(Answer, match="403"):
            cluster.call(method, path, None if method == "GET" else {}, token=token)


def test_only_the_named_configmap_may_be_changed(cluster: Cluster, hands: Hands) -> None:
    token = hands.token_file.read_text()
    with pytest.raises(Answer, match="403"):
        cluster.call("PATCH", "/api/v1/namespaces/shop/configmaps/other", {}, token=token)
    with pytest.raises(Answer, match="404"):
        cluster.call("PATCH", "/api/v1/namespaces/payments/configmaps/feature-flags", {}, token=token)


# -- every action that changes a field: executed, verified, undone


def deployment(cluster: Cluster, name: str) -> str:
    replica_set(cluster, cluster.create(workload("Deployment", name)), 1)
    return f"deployment/shop/{name}"


def autoscaler(cluster: Cluster, name: str) -> str:
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    cluster.create(
        {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
         "metadata": {"name": name, "namespace": "shop"},
         "spec": {"minReplicas": 2, "maxReplicas": 5, "scaleTargetRef": target}}
    )  # fmt: skip
    return f"autoscaler/shop/{name}"


def cronjob(cluster: Cluster, name: str) -> str:
    job = {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "a", "image": "a"}]}}}
    cluster.create({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": name, "namespace": "shop"},
                    "spec": {"schedule": "* * * * *", "jobTemplate": {"spec": job}}})  # fmt: skip
    return f"cronjob/shop/{name}"


def flags(cluster: Cluster, _: str) -> str:
    cluster.delete("configmap/shop/feature-flags")
    cluster.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "feature-flags", "namespace": "shop"},
                    "data": {"new-checkout": "on"}})  # fmt: skip
    return "configmap/shop/feature-flags"


def node(cluster: Cluster, name: str) -> str:
    cluster.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    return f"node/{name}"


def cordoned(cluster: Cluster, name: str) -> str:
    cluster.patch(node(cluster, name), {"spec": {"unschedulable": True}})
    return f"node/{name}"


Read = Callable[[Document], Any]
CHANGES: dict[str, tuple[Callable[[Cluster, str], str], dict[str, Any], Read, Any, Any]] = {
    # action -> makes the object, parameters, reads the value, before, after
    "kubernetes.scale": (deployment, {"change": 2}, lambda o: o["spec"]["replicas"], 3, 5),
    "kubernetes.set_resources": (
        deployment,
        {"resource": "memory", "percent": 400 // 2},
        lambda o: o["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"],
        "256Mi",
        "512Mi",
    ),
    "kubernetes.annotate": (
        deployment,
        {"key": "example.com/under-repair", "value": "since the morning"},
        lambda o: o["metadata"].get("annotations", {}).get("example.com/under-repair"),
        None,
        "since the morning",
    ),
    "kubernetes.hpa_bounds": (
        autoscaler,
        {"change": 3},
        lambda o: (o["spec"]["minReplicas"], o["spec"]["maxReplicas"]),
        (2, 5),
        (2, 8),
    ),
    "kubernetes.suspend_cronjob": (cronjob, {}, lambda o: bool(o["spec"].get("suspend")), False, True),
    "kubernetes.set_config": (
        flags,
        {"key": "new-checkout", "value": "off"},
        lambda o: o["data"]["new-checkout"],
        "on",
        "off",
    ),
    "kubernetes.cordon": (node, {}, lambda o: bool(o["spec"].get("unschedulable")), False, True),
    "kubernetes.uncordon": (cordoned, {}, lambda o: bool(o["spec"].get("unschedulable")), True, False),
}


def hands_for(action: str, cluster: Cluster, directory: Path) -> Hands:
    on_nodes = action.endswith(("cordon", "drain"))
    return Hands(cluster, directory, "wide" if on_nodes else "ops", "" if on_nodes else "shop")


def parameters(name: str, params: dict[str, Any]) -> dict[str, Any]:
    kind, *rest = name.split("/")
    found: dict[str, Any] = {"name": rest[-1], **params}
    if kind != "node":
        found["namespace"] = rest[0]
    return found | ({"kind": kind} if kind in ("deployment", "statefulset", "daemonset") else {})


@pytest.mark.parametrize("action", sorted(CHANGES))
async def test_it_is_done_checked_and_marked(cluster: Cluster, tmp_path: Path, fresh: str, action: str) -> None:
    make, params, read, before, after = CHANGES[action]
    hands, name = hands_for(action, cluster, tmp_path), make(cluster, fresh)
    plan = await hands.plan(action, **parameters(name, params))
    assert any("the server would accept it" in n for n in plan.notes), plan.notes
    assert read(cluster.get(name)) == before, "planning has changed nothing"
    (step,) = plan.steps
    assert await exit_code(step.check, step) == 1
    assert await carry_out(plan) == "planned intent ran verified"
    found = cluster.get(name)
    assert read(found) == after
    assert await exit_code(step.check, step) == DONE
    assert found["metadata"]["labels"]["alertmedic.io/incident"] == "inc-7"
    assert found["metadata"]["annotations"]["alertmedic.io/action"] == action.removeprefix("kubernetes.")
    if not name.startswith("node/"):  # of nodes the server keeps no managers
        assert "alertmedic" in {f["manager"] for f in found["metadata"]["managedFields"]}
    # Once more: it is as wanted, nothing is written.
    assert await exit_code(step.argv, step) == DONE
    assert cluster.get(name)["metadata"]["resourceVersion"] == found["metadata"]["resourceVersion"]


@pytest.mark.parametrize("action", sorted(CHANGES))
async def test_what_does_not_help_is_undone(cluster: Cluster, tmp_path: Path, fresh: str, action: str) -> None:
    make, params, read, before, _ = CHANGES[action]
    hands, name = hands_for(action, cluster, tmp_path), make(cluster, fresh)
    plan = await hands.plan(action, **parameters(name, params))
    assert await carry_out(plan, helps=False) == "planned intent ran undoing undone"
    assert read(cluster.get(name)) == before


async def test_what_somebody_else_changed_is_not_undone(cluster: Cluster, hands: Hands, fresh: str) -> None:
    name = deployment(cluster, fresh)
    plan = await hands.plan("kubernetes.scale", **parameters(name, {"replicas": 4}))
    (step,) = plan.steps
    assert await exit_code(step.argv, step) == DONE
    cluster.patch(name, {"spec": {"replicas": 9}})
    assert await exit_code(step.undo, step) == NOTHING_DONE
    assert cluster.get(name)["spec"]["replicas"] == 9
    assert await exit_code(step.check, step) == CANNOT_TELL


# -- restart and rolling back


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet", "DaemonSet"])
async def test_a_pods_workload_is_restarted(cluster: Cluster, hands: Hands, fresh: str, kind: str) -> None:
    item = cluster.create(workload(kind, fresh))
    above = replica_set(cluster, item, 1) if kind == "Deployment" else item
    pod(cluster, f"{fresh}-x", above)
    plan = await hands.plan("kubernetes.rollout_restart", namespace="shop", kind="pod", name=f"{fresh}-x")
    (step,) = plan.steps
    name = f"{kind.lower()}/shop/{fresh}"
    assert step.target == name
    assert await exit_code(step.check, step) == 1
    assert await carry_out(plan) == "planned intent ran verified"
    assert "kubectl.kubernetes.io/restartedAt" in cluster.get(name)["spec"]["template"]["metadata"]["annotations"]
    assert await exit_code(step.check, step) == DONE


async def test_a_service_is_restarted_by_the_workload_of_its_inventory(
    cluster: Cluster, hands: Hands, fresh: str
) -> None:
    name = deployment(cluster, fresh)
    surroundings = context(inventory={"cart": {**hands.reach, "kubernetes_workload": name}}, targets=(), values={})
    plan = await guard.consider(Proposal(action="service.restart", service="cart"), CATALOG, surroundings, in_sandbox)
    assert isinstance(plan, Plan), plan
    assert (plan.steps[0].action, plan.steps[0].target) == ("service.restart.kubernetes", name)


async def test_a_paused_deployment_is_not_restarted(cluster: Cluster, hands: Hands, fresh: str) -> None:
    name = deployment(cluster, fresh)
    cluster.patch(name, {"spec": {"paused": True}})
    refused = await hands.declined("kubernetes.rollout_restart", **parameters(name, {}))
    assert refused.reason is Refusal.PROTECTED_TARGET
    assert "paused" in refused.detail


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet", "DaemonSet"])
async def test_a_bad_rollout_is_rolled_back_and_that_undone(
    cluster: Cluster, hands: Hands, fresh: str, kind: str
) -> None:
    keep = replica_set if kind == "Deployment" else controller_revision
    item = cluster.create(workload(kind, fresh))
    name = f"{kind.lower()}/shop/{fresh}"
    keep(cluster, item, 1)
    for revision, image in ((2, f"{fresh}:2"), (3, f"{fresh}:broken")):
        changed = {"spec": {"template": {"spec": {"containers": [{"name": "app", "image": image}]}}}}
        item = cluster.call("PATCH", path_of(name), changed, content="application/strategic-merge-patch+json")
        keep(cluster, item, revision)

    def image_now() -> str:
        found: str = cluster.get(name)["spec"]["template"]["spec"]["containers"][0]["image"]
        return found

    plan = await hands.plan("kubernetes.rollout_undo", namespace="shop", kind=kind.lower(), name=fresh)
    (step,) = plan.steps
    assert plan.autonomy == "approve", "it changes what runs: never by itself"
    assert await carry_out(plan) == "planned intent ran verified"
    assert image_now() == f"{fresh}:2"
    assert await exit_code(step.check, step) == DONE
    assert await exit_code(step.undo, step) == DONE
    assert image_now() == f"{fresh}:broken"


async def test_there_is_nothing_before_the_first_revision(cluster: Cluster, hands: Hands, fresh: str) -> None:
    name = deployment(cluster, fresh)
    refused = await hands.declined("kubernetes.rollout_undo", **parameters(name, {}))
    assert "no revision before" in refused.detail


# -- pods and nodes


def budget(cluster: Cluster, app: str, allowed: int) -> None:
    """A PodDisruptionBudget, with the status that its controller would write."""
    spec = {"minAvailable": 1, "selector": {"matchLabels": {"app": app}}}
    cluster.create({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
                    "metadata": {"name": app, "namespace": "shop"}, "spec": spec})  # fmt: skip
    grant(cluster, app, allowed)


def grant(cluster: Cluster, app: str, allowed: int) -> None:
    path = f"/apis/policy/v1/namespaces/shop/poddisruptionbudgets/{app}"
    status = {"disruptionsAllowed": allowed, "currentHealthy": 3, "desiredHealthy": 1, "expectedPods": 3,
              "observedGeneration": cluster.call("GET", path)["metadata"]["generation"]}  # fmt: skip
    cluster.call("PATCH", f"{path}/status", {"status": status})


async def test_a_pod_is_evicted_within_its_budget(cluster: Cluster, hands: Hands, fresh: str) -> None:
    above = replica_set(cluster, cluster.create(workload("Deployment", fresh)), 1)
    pod(cluster, f"{fresh}-x", above)
    budget(cluster, fresh, 0)
    plan = await hands.plan("kubernetes.evict_pod", namespace="shop", name=f"{fresh}-x")
    assert any("disruption budget" in n for n in plan.notes)
    (step,) = plan.steps
    assert await exit_code(step.argv, step) == NOTHING_DONE, "its budget says no"
    assert await exit_code(step.check, step) == 1
    grant(cluster, fresh, 1)
    assert await carry_out(plan) == "planned intent ran verified"
    assert await exit_code(step.check, step) == DONE


async def test_a_pod_made_anew_is_not_evicted(cluster: Cluster, hands: Hands, fresh: str) -> None:
    item = cluster.create(workload("StatefulSet", fresh))
    pod(cluster, f"{fresh}-0", item)
    plan = await hands.plan("kubernetes.evict_pod", namespace="shop", name=f"{fresh}-0")
    cluster.delete(f"pod/shop/{fresh}-0")
    pod(cluster, f"{fresh}-0", item)
    (step,) = plan.steps
    assert await exit_code(step.argv, step) == NOTHING_DONE
    assert "deletionTimestamp" not in cluster.get(f"pod/shop/{fresh}-0")["metadata"]
    assert await exit_code(step.check, step) == DONE, "the pod that was meant is gone"


async def test_a_pod_without_controller_is_not_evicted(cluster: Cluster, hands: Hands, fresh: str) -> None:
    pod(cluster, fresh, None)
    assert (await hands.declined("kubernetes.evict_pod", namespace="shop", name=fresh)).reason is (
        Refusal.PROTECTED_TARGET
    )


@pytest.fixture
def full_node(cluster: Cluster, fresh: str) -> str:
    """A node with two pods of a deployment and one of a daemon set."""
    name = node(cluster, f"node-{fresh}")
    above = replica_set(cluster, cluster.create(workload("Deployment", fresh)), 1)
    for i in range(2):
        pod(cluster, f"{fresh}-{i}", above, node=f"node-{fresh}")
    pod(cluster, f"{fresh}d-0", cluster.create(workload("DaemonSet", f"{fresh}d")), node=f"node-{fresh}")
    return name


async def kubelet(cluster: Cluster, names: list[str]) -> None:
    """Ends the pods that are being deleted, as the node would."""
    left = set(names)
    while left:
        for name in sorted(left):
            try:
                found = await asyncio.to_thread(cluster.get, name)
            except Answer:
                left.discard(name)
                continue
            if found["metadata"].get("deletionTimestamp"):
                await asyncio.to_thread(cluster.delete, name)
        await asyncio.sleep(0.1)


async def test_a_node_is_drained_within_budgets_and_uncordoned(
    cluster: Cluster, tmp_path: Path, full_node: str, fresh: str
) -> None:
    hands = hands_for("drain", cluster, tmp_path)
    budget(cluster, fresh, 1)
    plan = await hands.plan("kubernetes.drain", name=full_node.removeprefix("node/"))
    assert plan.autonomy == "approve"
    (step,) = plan.steps
    assert await exit_code(step.check, step) == 1
    helper = asyncio.create_task(kubelet(cluster, [f"pod/shop/{fresh}-{i}" for i in range(2)]))
    task = asyncio.create_task(carry_out(plan))
    path = f"/apis/policy/v1/namespaces/shop/poddisruptionbudgets/{fresh}"
    while not cluster.call("GET", path)["status"].get("disruptedPods"):
        assert not task.done(), task.result()
        await asyncio.sleep(0.1)
    await asyncio.to_thread(grant, cluster, fresh, 1)  # the first pod is up elsewhere: its controller allows the next
    assert await task == "planned intent ran verified"
    await helper
    assert await exit_code(step.check, step) == DONE
    assert cluster.get(full_node)["spec"]["unschedulable"] is True
    assert "deletionTimestamp" not in cluster.get(f"pod/shop/{fresh}d-0")["metadata"]
    assert await exit_code(step.undo, step) == DONE
    assert not cluster.get(full_node)["spec"].get("unschedulable")


async def test_a_drain_that_a_budget_holds_up_fails_and_uncordons(
    cluster: Cluster, tmp_path: Path, full_node: str, fresh: str
) -> None:
    hands = hands_for("drain", cluster, tmp_path)
    budget(cluster, fresh, 0)
    plan = await hands.plan("kubernetes.drain", name=full_node.removeprefix("node/"))
    (step,) = plan.steps
    argv = tuple("--seconds=3" if a.startswith("--seconds=") else a for a in step.argv)
    assert await exit_code(argv, step) == 1
    assert cluster.get(f"pod/shop/{fresh}-0")["status"]["phase"] == "Running"
    assert await exit_code(step.undo, step) == DONE
    assert not cluster.get(full_node)["spec"].get("unschedulable")


async def test_a_drain_has_its_bound(cluster: Cluster, tmp_path: Path, full_node: str) -> None:
    hands = hands_for("drain", cluster, tmp_path)
    refused = await hands.declined("kubernetes.drain", name=full_node.removeprefix("node/"), max_pods=1)
    assert "2 pods would have to move" in refused.detail


async def test_capture_reads_state_and_events(cluster: Cluster, hands: Hands, fresh: str) -> None:
    made = pod(cluster, fresh, None, node=node(cluster, f"node-{fresh}").removeprefix("node/"))
    cluster.call("PATCH", path_of(f"pod/shop/{fresh}") + "/status",
                 {"status": {"containerStatuses": [container_status(4, "OOMKilled")]}})  # fmt: skip
    reference = {"kind": "Pod", "namespace": "shop", "name": fresh, "uid": made["metadata"]["uid"]}
    cluster.create({"apiVersion": "v1", "kind": "Event", "metadata": {"name": f"{fresh}.1", "namespace": "shop"},
                    "involvedObject": reference, "reason": "BackOff", "type": "Warning",
                    "message": "Back-off restarting failed container"})  # fmt: skip
    plan = await hands.plan("kubernetes.capture", namespace="shop", name=fresh)
    (step,) = plan.steps
    assert step.read_only
    result = await in_sandbox(step.argv, step.limits)
    assert result.exit_code == DONE
    assert '"OOMKilled"' in result.stdout
    assert "Back-off restarting" in result.stdout
    assert '"log_missing"' in result.stdout, "no kubelet runs here, and it says so"


# -- conflicts, refusals, trouble


async def test_a_changed_spec_is_left_alone(cluster: Cluster, hands: Hands, fresh: str) -> None:
    """The value is as planned, but somebody rolled something else out in between."""
    name = deployment(cluster, fresh)
    (step,) = (await hands.plan("kubernetes.scale", **parameters(name, {"replicas": 4}))).steps
    cluster.patch(name, {"spec": {"minReadySeconds": 7}})
    assert await exit_code(step.argv, step) == NOTHING_DONE
    assert cluster.get(name)["spec"]["replicas"] == 3


async def test_a_changed_status_is_no_conflict(cluster: Cluster, hands: Hands, fresh: str) -> None:
    name = deployment(cluster, fresh)
    (step,) = (await hands.plan("kubernetes.scale", **parameters(name, {"replicas": 4}))).steps
    cluster.patch(name, {"status": {"replicas": 3, "observedGeneration": 1}}, sub="/status")
    assert await exit_code(step.argv, step) == DONE


async def test_an_object_made_anew_is_left_alone(cluster: Cluster, hands: Hands, fresh: str) -> None:
    name = deployment(cluster, fresh)
    (step,) = (await hands.plan("kubernetes.scale", **parameters(name, {"replicas": 4}))).steps
    cluster.delete(name)
    cluster.create(workload("Deployment", fresh))
    assert await exit_code(step.argv, step) == NOTHING_DONE
    assert await exit_code(step.check, step) == CANNOT_TELL
    cluster.delete(name)
    assert await exit_code(step.check, step) == CANNOT_TELL


def api_of(hands: Hands, kind: type[Api] = Api) -> Api:
    return kind(hands.cluster.url, str(hands.token_file), str(hands.cluster.ca_file), ("shop",))


def test_a_write_in_between_is_a_conflict_and_is_read_again(
    cluster: Cluster, hands: Hands, fresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer wins each race: first twice (then we come through), then always (then we give up)."""
    from actions.builtin import kubernetes

    name = deployment(cluster, fresh)
    item = cluster.get(name)
    conflicts: list[int] = []

    class Racing(Api):
        races = 2

        def patch(self, name: Name, body: Document, *, dry_run: bool = False) -> Document:
            if self.races:
                self.races -= 1
                stamp = {"annotations": {"example.com/by": f"somebody-{self.races}"}}
                cluster.patch(str(name), {"metadata": stamp})
            try:
                return super().patch(name, body, dry_run=dry_run)
            except ApiError as error:
                conflicts.append(error.status)
                raise

    def argv(value: str, expected: str) -> list[str]:
        return ["run", "scale", "--api", "https://x", "--token-file", "/x", "--ca-file", "/x", "--incident", "inc-7",
                "--object", name, "--uid", item["metadata"]["uid"], "--key", "replicas", "--value", value,
                "--expected", expected]  # fmt: skip

    racing = api_of(hands, Racing)
    monkeypatch.setattr(kubernetes, "connect", lambda _: racing)
    assert kubernetes.main(argv("4", "3")) == DONE
    assert conflicts == [409, 409]
    racing.races = 99  # type: ignore[attr-defined]
    assert kubernetes.main(argv("5", "4")) == NOTHING_DONE
    assert cluster.get(name)["spec"]["replicas"] == 4


async def test_outside_the_plans_namespaces_nothing_is_asked(cluster: Cluster, tmp_path: Path, fresh: str) -> None:
    hands = Hands(cluster, tmp_path, "wide", "shop")
    cluster.create(workload("Deployment", fresh, "payments"))
    refused = await hands.declined("kubernetes.rollout_restart", namespace="payments", kind="deployment", name=fresh)
    assert refused.reason is Refusal.PROTECTED_TARGET
    hands.namespaces = ""
    refused = await hands.declined("kubernetes.rollout_restart", namespace="kube-system", kind="deployment", name="dns")
    assert "the cluster's own" in refused.detail


async def test_without_the_right_the_plan_says_so_and_the_step_does_nothing(
    cluster: Cluster, tmp_path: Path, fresh: str
) -> None:
    """A release that may read and not change: the suggestion is made, and says that it would be refused."""
    reader = Hands(cluster, tmp_path, "plain", "plain")
    cluster.create(workload("Deployment", fresh, "plain"))
    plan = await reader.plan("kubernetes.scale", namespace="plain", kind="deployment", name=fresh, replicas=4)
    assert any("refuses it to this account" in n and "403" in n for n in plan.notes), plan.notes
    assert await exit_code(plan.steps[0].argv, plan.steps[0]) == NOTHING_DONE
    assert cluster.get(f"deployment/plain/{fresh}")["spec"]["replicas"] == 3


async def test_what_the_server_finds_invalid_is_no_plan(cluster: Cluster, hands: Hands, fresh: str) -> None:
    name = deployment(cluster, fresh)
    changed = {"spec": {"template": {"spec": {"containers": [
        {"name": "app", "resources": {"requests": {"memory": "200Mi"}}}]}}}}  # fmt: skip
    cluster.call("PATCH", path_of(name), changed, content="application/strategic-merge-patch+json")
    wish = {"resource": "memory", "limit": "100Mi"}  # below the request
    refused = await hands.declined("kubernetes.set_resources", **parameters(name, wish))
    assert refused.reason is Refusal.RESOLVE_FAILED
    assert "422" in refused.detail


def status_of(cluster: Cluster, path: str, token: str) -> int:
    try:
        cluster.call("GET", path, token=token)
    except Answer as answer:
        return answer.status
    return 200


async def test_flow_control_is_waited_for_and_given_up(cluster: Cluster, hands: Hands, fresh: str) -> None:
    """A priority level with one seat, taken by a request that never sends its body: the server itself answers 429."""
    name = deployment(cluster, fresh)
    (step,) = (await hands.plan("kubernetes.scale", **parameters(name, {"replicas": 4}))).steps
    base = "/apis/flowcontrol.apiserver.k8s.io/v1"
    limited = {"nominalConcurrencyShares": 0, "lendablePercent": 0, "borrowingLimitPercent": 0,
               "limitResponse": {"type": "Reject"}}  # fmt: skip
    version = {"apiVersion": "flowcontrol.apiserver.k8s.io/v1"}
    cluster.call("POST", f"{base}/prioritylevelconfigurations", {
        **version, "kind": "PriorityLevelConfiguration", "metadata": {"name": "none"},
        "spec": {"type": "Limited", "limited": limited}})  # fmt: skip
    subject = {"kind": "ServiceAccount", "serviceAccount": {"name": "alertmedic", "namespace": "ops"}}
    every = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"], "namespaces": ["*"], "clusterScope": True}
    cluster.call("POST", f"{base}/flowschemas", {
        **version, "kind": "FlowSchema", "metadata": {"name": "none"},
        "spec": {"priorityLevelConfiguration": {"name": "none"}, "matchingPrecedence": 2,
                 "rules": [{"subjects": [subject], "resourceRules": [every]}]}})  # fmt: skip
    token, api = hands.token_file.read_text(), api_of(hands)
    seat = ssl.create_default_context(cafile=cluster.ca_file).wrap_socket(
        socket.create_connection(("127.0.0.1", cluster.port)), server_hostname="127.0.0.1"
    )
    try:
        await asyncio.sleep(1.0)  # the server reads its flow schemas from a watch of its own
        head = f"POST {path_of('pod/shop/none')}/eviction HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        seat.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n".encode())
        for _ in range(100):
            if status_of(cluster, path_of(name), token) == 429:
                break
            await asyncio.sleep(0.1)
        with pytest.raises(ApiError) as refused:
            await asyncio.to_thread(api.get, Name.parse(name))
        assert (refused.value.status, refused.value.budget) == (429, False)
        running = asyncio.create_task(exit_code(step.argv, step))
        await asyncio.sleep(0.5)
    finally:
        seat.close()
        cluster.call("DELETE", f"{base}/flowschemas/none")
        cluster.call("DELETE", f"{base}/prioritylevelconfigurations/none")
    assert await running == DONE, "it was sent again when the server had room"


def test_a_list_that_expires_half_way_is_begun_anew(
    cluster: Cluster, tmp_path: Path, fresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """410 Gone: etcd is compacted between two pages."""
    import json
    import urllib.request

    monkeypatch.setattr("actions.builtin.kubernetes_api.PAGE", 1)
    for i in range(3):
        pod(cluster, f"{fresh}-{i}", None)
    gone: list[int] = []

    class Compacting(Api):
        def call(self, method: str, path: str, body: Document | None = None, *, dry_run: bool = False,
                 query: dict[str, str] | None = None) -> Document:  # fmt: skip
            if (query or {}).get("continue") and not gone:
                cluster.patch(f"pod/shop/{fresh}-0", {"metadata": {"labels": {"touched": "yes"}}})
                revision = cluster.get(f"pod/shop/{fresh}-0")["metadata"]["resourceVersion"]
                request = urllib.request.Request(
                    f"http://127.0.0.1:{cluster.etcd_ports[0]}/v3/kv/compaction",
                    data=json.dumps({"revision": revision, "physical": False}).encode(),
                )
                urllib.request.urlopen(request, timeout=10).read()
            try:
                return super().call(method, path, body, dry_run=dry_run, query=query)
            except ApiError as error:
                gone.append(error.status)
                raise

    hands = Hands(cluster, tmp_path, "wide")
    found = [p["metadata"]["name"] for p in api_of(hands, Compacting).list("pod", "shop")]
    assert gone == [410]
    assert {f"{fresh}-{i}" for i in range(3)} <= set(found)
    assert len(set(found)) == len(found)


@contextlib.asynccontextmanager
async def cutting_proxy(target: int, cut: int) -> AsyncIterator[int]:
    """A TCP proxy whose connection number `cut` (from 1) delivers the whole request and loses the answer."""
    count = itertools.count(1)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lost = next(count) == cut
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", target)
        sent = 0

        async def down() -> None:
            while data := await up_reader.read(65536):
                if lost and sent > 1000:  # beyond the handshake: this answers the request
                    break
                writer.write(data)
                await writer.drain()

        back = asyncio.create_task(down())
        with contextlib.suppress(OSError):
            while not back.done():
                reading = asyncio.create_task(reader.read(65536))
                await asyncio.wait({reading, back}, return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    reading.cancel()
                    break
                if not (data := reading.result()):
                    break
                sent += len(data)
                up_writer.write(data)
                await up_writer.drain()
        back.cancel()
        for w in (writer, up_writer):
            w.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_a_lost_answer_is_looked_after(cluster: Cluster, hands: Hands, fresh: str) -> None:
    """The patch arrives, its answer does not: the step looks, and knows that it was done."""
    name = deployment(cluster, fresh)
    async with cutting_proxy(cluster.port, cut=2) as port:
        (step,) = (await hands.plan("kubernetes.scale", **parameters(name, {"replicas": 4}))).steps
        argv = tuple(a.replace(str(cluster.port), str(port)) for a in step.argv)
        result = await in_sandbox(argv, step.limits)
    assert result.exit_code == DONE, result
    assert '"answer"' in result.stdout, "the answer to the patch itself was lost"
    assert cluster.get(name)["spec"]["replicas"] == 4


async def test_an_outage_is_said_and_nothing_is_guessed(cluster: Cluster, hands: Hands, fresh: str) -> None:
    name = deployment(cluster, fresh)
    (step,) = (await hands.plan("kubernetes.scale", **parameters(name, {"replicas": 4}))).steps
    cluster.stop("apiserver", signal.SIGKILL)
    try:
        refused = await hands.declined("kubernetes.scale", **parameters(name, {"replicas": 5}))
        assert refused.reason is Refusal.RESOLVE_FAILED
        assert await exit_code(step.check, step) == CANNOT_TELL
        assert await exit_code(step.argv, step) == 1
    finally:
        await asyncio.to_thread(cluster.start_server)
    assert cluster.get(name)["spec"]["replicas"] == 3
    assert await exit_code(step.argv, step) == DONE


def test_every_kubernetes_action_is_tested_here() -> None:
    text = Path(__file__).read_text() + Path(__file__).with_name("test_kubernetes_exec.py").read_text()
    for definition in CATALOG:
        if definition.name.startswith("kubernetes."):
            assert f'"{definition.name}"' in text, definition.name
