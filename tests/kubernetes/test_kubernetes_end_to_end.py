"""Alerts of kube-prometheus through the running service beside a real API server: owners by ownerReferences alone,
plans made against the real objects, and some of them approved, carried out and verified by the series that recover."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from agent_world import Services, until
from alerts_world import KubeAgent, KubeScenario, scenario
from anyalert_world import backfill, rules, start
from chart import CHART, helm, objects
from chart import template as rendered
from cluster import Cluster, Document, controller_revision, owned, path_of, template, workload

pytestmark = pytest.mark.full
ACTIONS = ("rolloutUndo", "setResources", "hpaBounds", "scale", "capture")
# What is fired. A Deployment's bad rollout is not among them: the server stamps its ReplicaSets with the present, which
# is after the alert, and that speaks against a rollout.
PLANNED = (
    "kubernetes-apps/KubePodNotReady/warning/900",
    "kubernetes-apps/KubeDeploymentReplicasMismatch/warning/900",
    "kubernetes-apps/KubeStatefulSetGenerationMismatch/warning/900",
    "kubernetes-apps/KubeStatefulSetUpdateNotRolledOut/warning/900",
    "kubernetes-apps/KubeDaemonSetRolloutStuck/warning/900",
    "kubernetes-apps/KubeDaemonSetMisScheduled/warning/900",
    "kubernetes-apps/KubeHpaMaxedOut/warning/900",
    "kubernetes-resources/CPUThrottlingHigh/info/900",
    "kubernetes-system-kubelet/KubeNodePressure/info/600",
)


def memory(item: Document) -> Any:
    return item["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]


def cordoned(item: Document) -> Any:
    return item["spec"].get("unschedulable", False)


# What is carried out too, and how the object then looks.
EXECUTED: dict[str, tuple[Callable[[Document], Any], Any]] = {
    "kubernetes-apps/KubePodCrashLooping/warning/900": (memory, "384Mi"),
    "kubernetes-apps/KubeStatefulSetReplicasMismatch/warning/900": (memory, "384Mi"),
    "kubernetes-system-kubelet/KubeNodeNotReady/warning/900": (cordoned, True),
}
NO_PLAN = ("kubernetes-apps/KubeDeploymentGenerationMismatch/warning/900",)


@dataclass
class World:
    cluster: Cluster
    agent: KubeAgent
    scenarios: dict[str, KubeScenario]
    told: dict[str, dict[str, Any]]  # rule -> incident, right after its diagnosis

    def incident(self, rule: str) -> dict[str, Any]:
        status, found = self.agent.request("GET", f"/api/v1/incidents/{self.told[rule]['id']}")
        assert status == 200
        incident: dict[str, Any] = found
        return incident


@pytest.fixture(scope="module")
def world(
    cluster: Cluster, program: Callable[[str, str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    where = tmp_path_factory.mktemp("end-to-end")
    grant(cluster)
    begins = time.time() // 60 * 60 - 10 * 60
    known = {rule.id: (i, rule) for i, rule in enumerate(rules())}
    scenarios = {}
    for name in (*PLANNED, *EXECUTED, *NO_PLAN):
        number, rule = known[name]
        healed = {"heals_at": begins + 13 * 60} if name in EXECUTED else {}
        scenarios[name] = scenario(rule, begins, name=f"-{number}", by_metrics=False, **healed)
    for one in scenarios.values():
        populate(cluster, one)
    data = backfill(program("promtool", "prometheus"), where, scenarios.values(), begins)
    server = start(program("prometheus", "prometheus"), where, data)
    (where / "token").write_text(cluster.token_of("sre", "alertmedic"))
    reach = {"enabled": True, "api": cluster.url, "token_file": str(where / "token"), "ca_file": str(cluster.ca_file)}
    extra = {
        "kubernetes": {**reach, "nodes": True},
        "guard": {"storm": {"incidents": 1000}, "max_services_at_once": 8},
        "verify": {"poll_seconds": 2, "deadline_seconds": 300},
    }
    agent = KubeAgent(where / "agent", "", server.url, Services([]), autonomy="approve", step_seconds=15,
                      extra="\n".join(f"{key}: {json.dumps(value)}" for key, value in extra.items()))  # fmt: skip
    try:
        agent.start()
        told = agent.diagnosed([s.payload() for s in scenarios.values()], 120)
        yield World(cluster, agent, scenarios, {name: told[s.alert.fingerprint] for name, s in scenarios.items()})
    finally:
        agent.stop()
        server.process.kill()
        server.process.wait()


def grant(cluster: Cluster) -> None:
    """A release that may look at the whole cluster and plan everything."""
    cluster.namespace("sre", **{"pod-security.kubernetes.io/enforce": "restricted"})
    chosen = ",".join(f"kubernetes.actions.{name}=true" for name in ACTIONS)
    values = ["-f", str(CHART / "ci" / "cluster-values.yaml"), "--set", chosen]
    for item in objects(rendered(helm(), "-n", "sre", "--no-hooks", "--set", "fullnameOverride=sre", *values)):
        if item["kind"] in ("ServiceAccount", "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"):
            if item["kind"] == "ServiceAccount":
                item["metadata"]["name"] = "alertmedic"
            for subject in item.get("subjects", []):
                subject["name"] = "alertmedic"
            cluster.create(item)


def populate(cluster: Cluster, about: KubeScenario) -> None:
    """The objects of the scenario's shape, as its controllers would have made them; no metric says who owns what."""
    cluster.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": about.node}})
    down = about.cause in ("kubernetes.node_down", "host.down")
    conditions = [{"type": "Ready", "status": "Unknown" if down else "True"}]
    cluster.patch(f"node/{about.node}", {"status": {"conditions": conditions}}, sub="/status")
    if not (chain := [tuple(link.split()) for link in about.shape.get("chain", [])]):
        return
    cluster.namespace(about.namespace)
    kind, name = chain[-1]
    item = workload(kind, name, about.namespace)
    item["spec"]["template"] = template(name, name="main")
    made = cluster.create(item)
    place = f"{kind.lower()}/{about.namespace}/{name}"
    above = made
    if kind == "Deployment":
        above = revision(cluster, made, chain[0][1] + "0", 1)
    else:
        controller_revision(cluster, made, 1)
    image = {
        "name": "main",
        "image": f"{name}:2",
        "resources": made["spec"]["template"]["spec"]["containers"][0]["resources"],
    }
    made = cluster.patch(place, {"spec": {"template": {"spec": {"containers": [image]}}}})
    if kind == "Deployment":
        above = revision(cluster, made, chain[0][1], 2)
    else:
        controller_revision(cluster, made, 2)
        status = {"currentRevision": f"{name}-00001", "updateRevision": f"{name}-00002"}
        if kind == "StatefulSet":
            cluster.patch(place, {"status": {**status, "replicas": 3}}, sub="/status")
        above = made
    run(cluster, about, above)
    if target := about.shape.get("target"):
        _, to = target.split()
        reference = {"apiVersion": "apps/v1", "kind": "Deployment", "name": to}
        cluster.create({"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
                        "metadata": {"name": about.labels["horizontalpodautoscaler"], "namespace": about.namespace},
                        "spec": {"minReplicas": 2, "maxReplicas": 5, "scaleTargetRef": reference}})  # fmt: skip


def revision(cluster: Cluster, deployment: Document, name: str, number: int) -> Document:
    pod = json.loads(json.dumps(deployment["spec"]["template"]))
    pod["metadata"]["labels"]["pod-template-hash"] = name.rpartition("-")[2]
    metadata = {"name": name, "namespace": deployment["metadata"]["namespace"], "labels": pod["metadata"]["labels"],
                "annotations": {"deployment.kubernetes.io/revision": str(number)}}  # fmt: skip
    spec = {"replicas": 1, "selector": {"matchLabels": pod["metadata"]["labels"]}, "template": pod}
    item = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": metadata, "spec": spec}
    return cluster.create(owned(item, deployment))


def run(cluster: Cluster, about: KubeScenario, above: Document) -> None:
    spec = json.loads(json.dumps(above["spec"]["template"]))
    metadata = {"name": about.pod, "namespace": about.namespace, "labels": spec["metadata"]["labels"]}
    item = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {**spec["spec"], "nodeName": about.node}}
    cluster.create(owned(item, above))
    status = {"phase": "Running", "conditions": [{"type": "Ready", "status": "False"}]}
    cluster.call("PATCH", path_of(f"pod/{about.namespace}/{about.pod}") + "/status", {"status": status})


@pytest.mark.parametrize("rule", [*PLANNED, *EXECUTED, *NO_PLAN])
def test_the_owner_comes_from_owner_references(world: World, rule: str) -> None:
    incident, expected = world.told[rule], world.scenarios[rule].expected
    assert (incident["hypotheses"][0]["cause"], incident["owner"]) == (expected.cause, expected.owner)


@pytest.mark.parametrize("rule", [*PLANNED, *EXECUTED])
def test_a_plan_is_made_for_the_real_object(world: World, rule: str) -> None:
    """Its dry run on the server went well, or the eviction would be accepted."""
    expected = world.scenarios[rule].expected
    action, *params = expected.proposal.split()
    incident = until(lambda: found if (found := world.incident(rule))["plan"] else None, f"a plan: {rule}", 60)
    (step,) = incident["plan"]["steps"]
    assert step["action"] == action
    assert any("the server would accept it" in note for note in incident["plan"]["notes"]), incident["plan"]["notes"]
    named = dict(pair.split("=") for pair in params)
    kind = {"kubernetes.evict_pod": "pod", "kubernetes.cordon": "node", "kubernetes.hpa_bounds": "autoscaler"}
    path = "/".join(
        [
            named.get("kind", kind.get(action, "")),
            *([named["namespace"]] if "namespace" in named else []),
            named["name"],
        ]
    )
    assert f"--object={path}" in step["argv"]


@pytest.mark.parametrize("rule", NO_PLAN)
def test_what_has_no_safe_remedy_gets_no_plan(world: World, rule: str) -> None:
    incident = world.incident(rule)
    assert incident["plan"] is None
    assert incident["hypotheses"][0]["no_remedy"]


def test_some_are_approved_carried_out_and_verified(world: World) -> None:
    for rule in EXECUTED:
        done = world.agent.command("approve", world.told[rule]["id"])
        assert done.returncode == 0, done.stdout + done.stderr
    for rule, (read, after) in EXECUTED.items():

        def over(rule: str = rule) -> dict[str, Any] | None:
            found = world.incident(rule)
            return found if found["state"] in ("resolved", "escalated") else None

        incident = until(over, f"{rule} is over", 400)
        told = "\n".join(line["text"] for line in incident["story"])
        assert incident["state"] == "resolved", told
        owner = world.scenarios[rule].expected.owner
        item = world.cluster.get(owner)
        assert read(item) == after
        assert item["metadata"]["labels"]["alertmedic.io/incident"] == incident["id"]
        past = incident["plan"] or incident["past_plans"][-1]
        assert "verified" in json.dumps(past)
