"""What the API server says of pods, rollouts, nodes, claims and autoscalers decides which cause comes first; what it
does not say weighs nothing."""

from __future__ import annotations

from typing import Any

import pytest

from agent.packs import load_packs
from rules.diagnose import diagnose
from rules.model import Alert, Diagnosis, Evidence, Fact, Situation
from rules.packs import PackSet

NOW, ONSET = 10_000.0, 8_800.0  # the look, twenty minutes after the onset
POD, WORKLOAD, NODE = "pod/shop/cart-6d-x", "deployment/shop/cart", "node/a"
LABELS = {"namespace": "shop", "pod": "cart-6d-x", "container": "main"}


@pytest.fixture(scope="module")
def packs() -> PackSet:
    return load_packs((), ("service",))


def pod(**more: Any) -> Fact:
    usual: dict[str, Any] = {"phase": "Running", "ready": False, "restarts": 7.0, "scheduled": True, "owner": WORKLOAD,
                             "namespace": "shop", "name": "cart-6d-x", "node": "a", "container": "main"}  # fmt: skip
    return Fact("kubernetes.pod", POD, POD, {**usual, **more})


def rollout(before_onset: float) -> Fact:
    """One that happened so many seconds before the onset."""
    age = NOW - ONSET + before_onset
    return Fact("kubernetes.rollout", WORKLOAD, POD, {"revision": 8.0, "image_changed": True, "age_seconds": age})


def event(reason: str, count: float = 9.0) -> Fact:
    attributes: dict[str, Any] = {
        "about": POD,
        "type": "Warning",
        "reason": reason,
        "count": count,
        "age_seconds": 60.0,
    }
    return Fact("kubernetes.event", f"{POD} {reason}", POD, attributes)


def node(subject: str = NODE, **more: Any) -> Fact:
    return Fact("kubernetes.node", subject, subject, {"ready": True, "pressure": False, "unschedulable": False, **more})


def told(packs: PackSet, name: str, *facts: Fact, missing: str | None = None, **labels: str) -> Diagnosis:
    given = {"alertname": name, "severity": "warning", **(labels or LABELS)}
    alert = Alert(tenant="", fingerprint="f", status="firing", labels=given, starts_at=ONSET, digest="d")
    entry = (
        POD
        if not labels
        else f"node/{labels['node']}"
        if "node" in labels
        else f"autoscaler/shop/{labels['horizontalpodautoscaler']}"
    )
    evidence = Evidence("kubernetes.objects", "kubernetes", facts=facts, missing=missing)
    return diagnose(Situation((alert,), entry, ONSET, NOW, (evidence,)), packs)


OLD = rollout(5 * 86400.0)
ENDED = {"waiting_reason": "CrashLoopBackOff", "ended_seconds_ago": 40.0}
CLAIM = Fact("kubernetes.claim", "persistentvolumeclaim/shop/data", POD, {"phase": "Pending"})
CASES: list[tuple[str, list[Fact], str, str]] = [
    # alert, facts, first cause, what is proposed and to whom
    ("KubePodCrashLooping", [pod(last_reason="OOMKilled", **ENDED), OLD],
     "kubernetes.out_of_memory", "kubernetes.set_resources deployment/cart"),
    ("KubePodCrashLooping", [pod(last_reason="Error", **ENDED), OLD],
     "kubernetes.application_exits", "kubernetes.capture cart-6d-x"),
    ("KubePodCrashLooping",
     [pod(last_reason="Error", **ENDED), rollout(300.0)],
     "kubernetes.bad_rollout", "kubernetes.rollout_undo deployment/cart"),
    ("KubePodNotReady", [pod(phase="Pending", waiting_reason="ImagePullBackOff"), OLD],
     "kubernetes.image_unavailable", "none"),
    ("KubeContainerWaiting", [pod(phase="Pending", waiting_reason="ErrImagePull"), rollout(300.0)],
     "kubernetes.bad_rollout", "kubernetes.rollout_undo deployment/cart"),
    ("KubeContainerWaiting", [pod(phase="Pending", waiting_reason="CreateContainerConfigError"), OLD],
     "kubernetes.config_missing", "none"),
    ("KubePodNotReady", [pod(), OLD, event("Unhealthy")], "kubernetes.probe_failing", "kubernetes.evict_pod cart-6d-x"),
    ("KubePodNotReady", [pod(phase="Pending", scheduled=False), OLD, event("FailedScheduling")],
     "kubernetes.no_room", "none"),
    ("KubePodNotReady",
     [pod(phase="Pending"), OLD, CLAIM],
     "kubernetes.volume_unbound", "none"),
    ("KubePodNotReady", [pod(), OLD, node(ready=False, not_ready=True)], "kubernetes.node_down", "kubernetes.cordon a"),
]  # fmt: skip


@pytest.mark.parametrize(("alert", "facts", "cause", "proposal"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_facts_alone_name_the_cause(packs: PackSet, alert: str, facts: list[Fact], cause: str, proposal: str) -> None:
    diagnosis = told(packs, alert, *facts)
    best = diagnosis.best
    assert best is not None, diagnosis.sentence
    assert best.cause == cause, diagnosis.sentence
    found = [
        f"{p.action} {'/'.join(str(p.params[k]) for k in ('kind', 'name') if k in p.params)}" for p in best.proposals
    ]
    assert (found or ["none"]) == [proposal]
    assert diagnosis.owner == WORKLOAD


@pytest.mark.parametrize(("alert", "facts", "cause", "proposal"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_something_speaks_against_the_others(
    packs: PackSet, alert: str, facts: list[Fact], cause: str, proposal: str
) -> None:
    """Every cause that is weighed and does not come first has less for it, in words a person can read."""
    diagnosis = told(packs, alert, *facts)
    assert all(h.posterior < 0.35 for h in diagnosis.hypotheses[1:])
    speaks = [c for c in diagnosis.hypotheses[0].contributions if c.evidence.startswith("k8s_fact_") and c.log_odds > 0]
    assert speaks
    assert all(c.text for c in speaks)


@pytest.mark.parametrize("alert", sorted({case[0] for case in CASES}))
def test_missing_facts_weigh_nothing(packs: PackSet, alert: str) -> None:
    """No source, a source that failed and one that knows nothing of the object are one and the same."""
    answers = [told(packs, alert, missing="403"), told(packs, alert), told(packs, alert, node("node/b"))]
    assert {d.verdict for d in answers} == {"insufficient_evidence"}
    for diagnosis in answers:
        for hypothesis in diagnosis.hypotheses:
            assert all(not c.log_odds for c in hypothesis.contributions if c.evidence.startswith("k8s_fact_"))


def test_pressure_of_a_node(packs: PackSet) -> None:
    diagnosis = told(packs, "KubeNodeNotReady", node(pressure=True, memory_pressure=True), node="a")
    assert diagnosis.hypotheses[0].cause == "kubernetes.node_pressure"


def test_a_node_of_which_nobody_knows_whether_it_is_ready_is_not_down(packs: PackSet) -> None:
    unknown = Fact("kubernetes.node", NODE, NODE, {"pressure": False})
    assert told(packs, "KubePodNotReady", pod(), OLD, unknown).verdict == "insufficient_evidence"
