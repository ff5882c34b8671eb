"""Facts about Kubernetes objects, from the copy that `kubernetes_cache` keeps.

Asked by `agent.sources.gather` for the evidence `kubernetes.objects`, which carries all of them. Exists because a pod's
last state, a rollout's images or an autoscaler at its bound say in words what series only hint at, and because an
action needs the owner of what an alert is about. Told is what the alerts' labels and the incident's services lead to:
the object, the workload above it, the pods below that, their nodes, claims, autoscaler, services, recent rollout and
events; at most MAX_FACTS, what is unhealthy first. It never asks the API server while an incident waits; a kind that is
not known (no right to see it, API server away) is a warning, and if pods are unknown the evidence is missing.

| kind | subject | attributes |
|---|---|---|
| kubernetes.pod | pod/shop/cart-0 | phase, node, ready, restarts, waiting_reason, last_reason, |
| | | last_exit_code, ended_seconds_ago, container, age_seconds, owner, probes, deleting, scheduled, unschedulable |
| kubernetes.workload | deployment/shop/cart | desired, ready, updated, available, short, paused, observed, images, |
| | | stuck_reason |
| kubernetes.rollout | deployment/shop/cart | revision, images, images_before, image_changed, age_seconds |
| kubernetes.autoscaler | autoscaler/shop/cart | target, min, max, current, desired, at_max |
| kubernetes.node | node/a | ready, not_ready, memory_pressure, disk_pressure, pid_pressure, pressure, |
| | | network_unavailable, unschedulable |
| kubernetes.claim | persistentvolumeclaim/shop/data | phase |
| kubernetes.endpoints | service/shop/cart | ready, not_ready |
| kubernetes.event | what it is about, and the reason | about, type, reason, message, count, age_seconds |

The fact's `service` is the node of the incident's graph that it belongs to: the incident's service where the workload
runs one; what the alert is about (`rules.subjects`) for that object and what lies above and around it; for other pods
their workload.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from agent.sources import EvidenceRequest, bounded
from agent.sources.kubernetes_cache import Cache, Item, Value
from rules.model import Evidence, Fact
from rules.subjects import subject_of

EVIDENCE = "kubernetes.objects"
MAX_FACTS = 400
MAX_PODS = 50  # of one workload, unhealthy ones first
MAX_EVENTS = 60
WORKLOADS = ("deployment", "statefulset", "daemonset")
APP_LABELS = ("app.kubernetes.io/name", "app", "k8s-app")
# Alert label -> kind of the object that it names, with `namespace`.
NAMED = {
    "pod": "pod",
    "deployment": "deployment",
    "statefulset": "statefulset",
    "daemonset": "daemonset",
    "replicaset": "replicaset",
    "horizontalpodautoscaler": "autoscaler",
    "persistentvolumeclaim": "persistentvolumeclaim",
}


@dataclass(frozen=True, slots=True)
class KubernetesQuery:
    """The one question this source answers; append it to the queries of a request."""

    name: str = EVIDENCE
    query: str = ""
    source: str = "kubernetes"


class KubernetesSource:
    """Answers from `cache`, which somebody else keeps running."""

    name = "kubernetes"

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    async def fetch(self, request: EvidenceRequest, deadline_seconds: float) -> tuple[Evidence, ...]:
        """One look for all queries. Raises nothing of its own; what is unknown is `missing`."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        unknown = self._cache.missing()
        pods = [w for w in self._cache.watched if w.kind == "pod"]
        reason = None
        facts: tuple[Fact, ...] = ()
        if all(w.missing is not None and not w.items for w in pods):
            reason = bounded("; ".join(f"{path}: {why}" for path, why in unknown.items() if path.endswith("pods")))
        else:
            facts = await asyncio.to_thread(self._facts, request)
        warnings = tuple(bounded(f"not known: {path}: {why}") for path, why in sorted(unknown.items())[:8])
        seconds = loop.time() - began
        return tuple(
            Evidence(query.name, self.name, facts=facts, missing=reason, warnings=warnings, seconds=seconds)
            if query.name == EVIDENCE
            else Evidence(query.name, self.name, missing=f"the source knows {EVIDENCE} only", query=query.query)
            for query in request.queries
        )

    def _facts(self, request: EvidenceRequest) -> tuple[Fact, ...]:
        look = _Look(self._cache, request)
        return tuple(look.facts())


class _Look:
    """One request's view: what it is about, and what belongs to that."""

    def __init__(self, cache: Cache, request: EvidenceRequest) -> None:
        self._request = request
        self._now = request.end
        # A copy of the references: the watches go on meanwhile, in the loop's thread.
        self._kinds: dict[str, list[Item]] = {kind: [] for kind in (*WORKLOADS, "pod")}
        for watched in cache.watched:
            self._kinds.setdefault(watched.kind, []).extend(list(watched.items.values()))
        self._paths = {i.path: i for kind in (*WORKLOADS, "pod", "replicaset", "autoscaler", "node",
                                              "persistentvolumeclaim") for i in self._kinds.get(kind, ())}  # fmt: skip
        self._named: dict[str, str] = {}  # path of a workload -> the incident's service it runs
        self._subjects: dict[str, str] = {}  # path of an object that an alert names, or of its workload -> the subject

    def facts(self) -> list[Fact]:
        workloads, pods, nodes = self._about()
        found = [self._workload(w) for w in workloads]
        found += [f for w in workloads if (f := self._rollout(w)) is not None]
        found += [self._autoscaler(a) for a in self._kinds.get("autoscaler", ()) if self._targets(a, workloads)]
        found += [self._pod(p) for p in pods]
        found += [self._plain("kubernetes.node", self._paths[n]) for n in sorted(nodes) if n in self._paths]
        found += self._claims(pods)
        found += self._endpoints(pods)
        subjects = {f.subject for f in found} | {i.owner for i in pods}
        return [*found[: MAX_FACTS - MAX_EVENTS], *self._events(subjects)]

    def _about(self) -> tuple[list[Item], list[Item], set[str]]:
        """The workloads, pods and nodes that alerts and services lead to."""
        seeds, nodes, namespaces = self._seeds()
        workloads: dict[str, Item] = {}
        alone: dict[str, Item] = {}
        for item in seeds:
            above = self._workload_of(item)
            if above is not None:
                workloads[above.path] = above
            elif item.kind == "pod":
                alone[item.path] = item
        pods = dict(alone)
        for pod in self._kinds["pod"]:
            above = self._workload_of(pod)
            if (above is not None and above.path in workloads) or f"node/{pod.attributes['node']}" in nodes:
                pods[pod.path] = pod
        if not workloads and not pods:  # nothing more exact than a namespace
            for pod in self._kinds["pod"]:
                if pod.namespace in namespaces and not pod.attributes["ready"]:
                    pods[pod.path] = pod
        chosen = sorted(pods.values(), key=_health)[: MAX_PODS * max(1, min(4, len(workloads)))]
        nodes |= {f"node/{p.attributes['node']}" for p in chosen if p.attributes["node"]}
        return sorted(workloads.values(), key=lambda w: w.path), chosen, nodes

    def _seeds(self) -> tuple[list[Item], set[str], set[str]]:
        found: list[Item] = []
        nodes: set[str] = set()
        namespaces: set[str] = set()
        for labels in self._request.alerts:
            namespace = labels.get("namespace", "")
            namespaces.add(namespace)
            for label, kind in NAMED.items():
                if name := labels.get(label, ""):
                    item = self._paths.get(f"{kind}/{namespace}/{name}")
                    if item is not None:
                        item = self._paths.get(str(item.attributes.get("target", "")), item)
                        found.append(item)
                        above = self._workload_of(item)
                        for path in {item.path, above.path if above is not None else item.path}:
                            self._subjects.setdefault(path, subject_of(labels))
            if node := labels.get("node", ""):
                nodes.add(f"node/{node}")
        wanted = set(self._request.services)
        for kind in WORKLOADS:
            for item in self._kinds[kind]:
                if item.name in wanted or item.path in wanted:
                    self._named[item.path] = item.name if item.name in wanted else item.path
                    found.append(item)
        for pod in self._kinds["pod"]:
            named = next((pod.labels[k] for k in APP_LABELS if pod.labels.get(k) in wanted), "")
            if named and (above := self._workload_of(pod)) is not None:
                self._named.setdefault(above.path, named)
                found.append(above)
        return found, nodes, namespaces - {""}

    def _workload_of(self, item: Item) -> Item | None:
        """By owner references: pod -> ReplicaSet -> Deployment."""
        for _ in range(3):
            if item.kind in WORKLOADS:
                return item
            above = self._paths.get(item.owner)
            if above is None:
                return None
            item = above
        return None

    def _service(self, item: Item) -> str:
        above = self._workload_of(item)
        if above is not None and above.path in self._named:
            return self._named[above.path]
        own = self._subjects.get(item.path)
        if own is not None or above is None:
            return own or item.path
        # Another pod of the workload is no part of what the alert is about.
        return above.path if item.kind == "pod" else self._subjects.get(above.path, above.path)

    def _fact(self, kind: str, item: Item, attributes: Mapping[str, Value], **more: Value) -> Fact:
        kept = {k: v for k, v in attributes.items() if v != "" and k not in ("created", "last_finished", "ready_since")}
        return Fact(kind, item.path, self._service(item), {**kept, **more})

    def _plain(self, kind: str, item: Item) -> Fact:
        return self._fact(kind, item, item.attributes)

    def _age(self, seconds: Value) -> float:
        return round(self._now - float(seconds), 1)

    def _pod(self, item: Item) -> Fact:
        above = self._workload_of(item)
        owner = above.path if above is not None else item.owner
        more: dict[str, Value] = {"namespace": item.namespace, "name": item.name, "owner": owner}
        more["age_seconds"] = self._age(item.attributes["created"])
        if finished := item.attributes.get("last_finished"):
            more["ended_seconds_ago"] = self._age(finished)
        return self._fact("kubernetes.pod", item, item.attributes, **more)

    def _workload(self, item: Item) -> Fact:
        short = float(item.attributes["desired"]) - float(item.attributes["available"])
        return self._fact("kubernetes.workload", item, item.attributes, namespace=item.namespace, name=item.name,
                          workload=item.kind, short=max(0.0, short))  # fmt: skip

    def _rollout(self, item: Item) -> Fact | None:
        """The newest revision of a deployment, and what ran before it."""
        if item.kind != "deployment":
            return None
        sets = [s for s in self._kinds.get("replicaset", ()) if s.owner == item.path]
        sets.sort(key=lambda s: float(s.attributes["revision"]))
        if not sets:
            return None
        newest, before = sets[-1].attributes, sets[-2].attributes if len(sets) > 1 else {}
        attributes: dict[str, Value] = {
            "revision": newest["revision"],
            "images": newest["images"],
            "images_before": before.get("images", ""),
            "image_changed": bool(before) and before["images"] != newest["images"],
            "age_seconds": self._age(newest["created"]),
        }
        return self._fact("kubernetes.rollout", item, attributes)

    def _targets(self, autoscaler: Item, workloads: Sequence[Item]) -> bool:
        return any(autoscaler.attributes["target"] == w.path for w in workloads)

    def _autoscaler(self, item: Item) -> Fact:
        target = self._paths.get(str(item.attributes["target"]))
        fact = self._plain("kubernetes.autoscaler", item)
        service = self._service(target) if target is not None else item.path
        return Fact(fact.kind, fact.subject, service, fact.attributes)

    def _claims(self, pods: Iterable[Item]) -> list[Fact]:
        found: dict[str, Fact] = {}
        for pod in pods:
            for name in str(pod.attributes.get("claims", "")).split(","):
                claim = self._paths.get(f"persistentvolumeclaim/{pod.namespace}/{name}")
                if claim is not None:
                    fact = self._plain("kubernetes.claim", claim)
                    found[claim.path] = Fact(fact.kind, fact.subject, self._service(pod), fact.attributes)
        return list(found.values())

    def _endpoints(self, pods: Sequence[Item]) -> list[Fact]:
        """Services that select one of these pods, with how many addresses are ready."""
        counts: dict[tuple[str, str], list[float]] = {}
        for piece in self._kinds.get("endpoints", ()):
            sums = counts.setdefault((piece.namespace, str(piece.attributes["of"])), [0.0, 0.0])
            sums[0] += float(piece.attributes["ready"])
            sums[1] += float(piece.attributes["not_ready"])
        found = []
        for service in self._kinds.get("service", ()):
            chosen = [p for p in pods if p.namespace == service.namespace and service.labels
                      and service.labels.items() <= p.labels.items()]  # fmt: skip
            if chosen and (service.namespace, service.name) in counts:
                ready, not_ready = counts[service.namespace, service.name]
                attributes: dict[str, Value] = {"ready": ready, "not_ready": not_ready}
                found.append(Fact("kubernetes.endpoints", service.path, self._service(chosen[0]), attributes))
        return found

    def _events(self, subjects: set[str]) -> list[Fact]:
        """Warnings first, then the latest."""
        about = [e for e in self._kinds.get("event", ()) if _ours(str(e.attributes["about"])) in subjects]
        about.sort(key=lambda e: (e.attributes["type"] != "Warning", -float(e.attributes["last_seen"])))
        found = []
        for event in about[:MAX_EVENTS]:
            item = self._paths.get(_ours(str(event.attributes["about"])))
            attributes = {k: v for k, v in event.attributes.items() if k not in ("created", "last_seen")}
            attributes["age_seconds"] = self._age(event.attributes["last_seen"])
            subject = f"{event.attributes['about']} {event.attributes['reason']}"
            service = self._service(item) if item is not None else ""
            found.append(Fact("kubernetes.event", subject, service, attributes))
        return found


def _ours(about: str) -> str:
    return about.replace("horizontalpodautoscaler/", "autoscaler/", 1)


def _health(pod: Item) -> tuple[bool, float, str]:
    """Unhealthy first, then those that restarted most."""
    return bool(pod.attributes["ready"]), -float(pod.attributes["restarts"]), pod.path
