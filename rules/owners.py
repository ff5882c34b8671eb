"""Which Kubernetes object has to change when a pod, a claim or a target is in trouble.

`owner_queries` is called by `agent.situation` for what an alert is about; `Owners` by `rules.diagnose`. A pod is no
object that anybody changes: its ReplicaSet's Deployment is. The chain comes from the API server's ownerReferences
where the Kubernetes source knows them (facts `kubernetes.pod`, `.workload`, `.autoscaler`), else from
kube-state-metrics: `kube_pod_owner`, `kube_replicaset_owner`, `kube_job_owner`, an autoscaler's target, the pods that
mount a claim, the pods behind a scrape target (`up`), the node that has an address. Names are data: nothing is asked
by a name that was not escaped, and what cannot be told, or is told in two ways, is no owner.

An object is named `kind/namespace/name` (`deployment/shop/cart`, `node/a`), with the kinds as actions spell them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rules.features import host_name
from rules.model import Situation
from rules.packs import EvidenceQuery
from rules.subjects import kind_of

PODS, SETS, JOBS = "kubernetes_pod_owner", "kubernetes_replicaset_owner", "kubernetes_job_owner"
TARGETS, MOUNTS, NODES = "kubernetes_autoscaler_target", "kubernetes_claim_pods", "kubernetes_node_address"
CLAIMS = "kubernetes_volume_claim"
WORKLOADS = ("deployment", "statefulset", "daemonset")
CHANGEABLE = (*WORKLOADS, "replicaset", "pod")  # what the actions that climb owner references take
MAX_CHAIN = 5
# Entity kind (`rules.subjects`) -> the object's kind where that differs.
_KINDS = {"kubejob": "job", "quota": "resourcequota", "disruptionbudget": "poddisruptionbudget"}
_OWNERS = {
    "ReplicaSet": "replicaset",
    "Deployment": "deployment",
    "StatefulSet": "statefulset",
    "DaemonSet": "daemonset",
    "Job": "job",
    "CronJob": "cronjob",
}
_BY_NAME = ", ".join(
    f"pod={label}*?"
    for label in (
        "deployment",
        "statefulset",
        "daemonset",
        "job_name",
        "horizontalpodautoscaler",
        "poddisruptionbudget",
    )
)
_CLAIM = "kube_pod_spec_volumes_persistentvolumeclaims_info"


def owner_queries(subject: str, labels: Mapping[str, str]) -> tuple[EvidenceQuery, ...]:
    """What to ask metrics about the owner of `subject`, as templates over the alert's labels; nothing about what is no
    Kubernetes object."""
    kind = kind_of(subject)
    pods = _pods(kind, labels)
    found: dict[str, str] = {}
    if pods:
        inside = "namespace" in labels
        owned = _selector("kube_pod_owner", 'owner_is_controller="true"', inside)
        mine = f"{owned} and on (namespace, pod) {pods}"
        found[PODS] = f"max by (namespace, pod, owner_kind, owner_name) ({mine})"
        for name, metric, label, owner in (
            (SETS, "kube_replicaset_owner", "replicaset", "ReplicaSet"),
            (JOBS, "kube_job_owner", "job_name", "Job"),
        ):
            sets = _selector("kube_pod_owner", f'owner_kind="{owner}"', inside)
            named = f'label_replace({sets} and on (namespace, pod) {pods}, "{label}", "$1", "owner_name", "(.+)")'
            above = _selector(metric, 'owner_is_controller="true"', inside)
            found[name] = (
                f"max by (namespace, {label}, owner_kind, owner_name) ({above} and on (namespace, {label}) {named})"
            )
    if kind == "kubejob":
        above = 'kube_job_owner{owner_is_controller="true",$alert(namespace, job_name)}'
        found[JOBS] = f"max by (namespace, job_name, owner_kind, owner_name) ({above})"
    elif kind == "autoscaler":
        target = "kube_horizontalpodautoscaler_info{$alert(namespace, horizontalpodautoscaler)}"
        by = "namespace, horizontalpodautoscaler, scaletargetref_kind, scaletargetref_name"
        found[TARGETS] = f"max by ({by}) ({target})"
    elif kind in ("persistentvolumeclaim", "persistentvolume"):
        found[MOUNTS] = f"max by (namespace, pod, persistentvolumeclaim) ({pods})"
    elif kind == "instance":
        by_name = "kube_node_info{$alert(node=instance@)}"
        by_address = "kube_node_info{$alert(internal_ip=instance@)}"
        found[NODES] = f"max by (node, internal_ip) ({by_name} or {by_address})"
    if kind == "persistentvolume":
        by = "persistentvolume, claim_namespace, name"
        found[CLAIMS] = f"max by ({by}) (kube_persistentvolume_claim_ref{{$alert(persistentvolume)}})"
    return tuple(EvidenceQuery(name=name, query=query) for name, query in sorted(found.items()))


def _selector(metric: str, matcher: str, inside: bool) -> str:
    return f"{metric}{{{matcher}{',$alert(namespace)' if inside else ''}}}"


def _pods(kind: str, labels: Mapping[str, str]) -> str:
    """An expression with a series (namespace, pod) for every pod of what the alert is about; "" for none."""
    if kind == "persistentvolumeclaim":
        return f"{_CLAIM}{{$alert(namespace, persistentvolumeclaim)}}"
    if kind == "persistentvolume":
        claim = "kube_persistentvolume_claim_ref{$alert(persistentvolume)}"
        named = f'label_replace({claim}, "persistentvolumeclaim", "$1", "name", "(.+)")'
        placed = f'label_replace({named}, "namespace", "$1", "claim_namespace", "(.+)")'
        return f"({_CLAIM} and on (namespace, persistentvolumeclaim) {placed})"
    if kind in ("pod", *WORKLOADS, "kubejob", "autoscaler", "disruptionbudget"):
        return f"kube_pod_info{{$alert(namespace, pod?, {_BY_NAME})}}"
    if kind in ("instance", "namespace", "target", "") and "namespace" in labels:
        if "pod" in labels:
            return "kube_pod_info{$alert(namespace, pod)}"
        if "job" in labels and kind != "instance":
            return "up{$alert(namespace, job, service?)}"
    if kind == "instance":
        return "kube_pod_info{$alert(pod_ip=instance@)}"
    return ""


@dataclass
class Owners:
    """Answers of one situation."""

    situation: Situation
    _up: dict[str, str] = field(default_factory=dict, repr=False)  # object -> its controller or target
    _pods: dict[str, set[str]] = field(default_factory=dict, repr=False)  # claim -> pods; "": all that were seen
    _nodes: dict[str, str] = field(default_factory=dict, repr=False)  # host part of an address or name -> node
    _services: dict[str, set[str]] = field(default_factory=dict, repr=False)  # node of the graph -> workloads

    def __post_init__(self) -> None:
        for evidence in self.situation.evidence:
            for series in evidence.frame.ids:
                self._told(evidence.name, dict(series.labels))
        for fact in self.situation.facts("kubernetes.pod"):  # after the series: the API server knows better
            self._own(fact.subject, str(fact.attributes.get("owner", "")))
        for fact in self.situation.facts("kubernetes.autoscaler"):
            self._own(fact.subject, str(fact.attributes.get("target", "")))
        for fact in self.situation.facts("kubernetes.workload"):
            self._services.setdefault(fact.service, set()).add(fact.subject)

    def of(self, node: str) -> str:
        """The object that a node of the graph (see `rules.subjects`) is or belongs to; "" for none."""
        kind = kind_of(node)
        if kind == "instance":
            if found := self._nodes.get(host_name(node.partition("/")[2])):
                return f"node/{found}"
            return self._behind()
        if kind in ("namespace", "target"):
            return self._behind() or (node if kind == "namespace" else "")
        if kind in ("persistentvolumeclaim", "persistentvolume"):
            return self._mounted(node)
        if kind == "node" or kind in _KINDS or kind in ("pod", "autoscaler", *WORKLOADS):
            path = node.partition("/")[2]
            return self.top(f"{_KINDS.get(kind, kind)}/{path}")
        return _one(self._services.get(node, set())) if not kind else ""

    def top(self, path: str) -> str:
        """The last of the chain of controllers above an object; itself where it has none."""
        for _ in range(MAX_CHAIN):
            above = self._up.get(path, "")
            if not above or path.partition("/")[0] in WORKLOADS:
                break
            path = above
        return path

    def alone(self) -> str:
        """The pod that all alerts name, as an object."""
        pods = {
            f"pod/{a.labels['namespace']}/{a.labels['pod']}"
            for a in self.situation.alerts
            if a.labels.get("namespace") and a.labels.get("pod")
        }
        return _one(pods)

    def _behind(self) -> str:
        """The one object above the pod of the alert, or above all pods behind its target."""
        if pod := self.alone():
            return self.top(pod)
        return _one({self.top(pod) for pod in self._pods.get("", ())})

    def _mounted(self, node: str) -> str:
        claims = {node}
        if kind_of(node) == "persistentvolume":
            claims = {claim for claim, volume in self._up.items() if volume == node}
        tops = {self.top(pod) for claim in claims for pod in self._pods.get(claim, ())}
        return _one(tops) or (_one(claims) or node)

    def _own(self, path: str, above: str) -> None:
        if above and above.partition("/")[0] in _OWNERS.values():
            self._up[path] = above

    def _told(self, name: str, labels: Mapping[str, str]) -> None:
        """One series of an answer to `owner_queries`."""
        namespace, owner = labels.get("namespace", ""), _OWNERS.get(labels.get("owner_kind", ""), "")
        above = f"{owner}/{namespace}/{labels.get('owner_name', '')}" if owner else ""
        if name == PODS:
            path = f"pod/{namespace}/{labels.get('pod', '')}"
            self._pods.setdefault("", set()).add(path)
            self._own(path, above)
        elif name == SETS:
            self._own(f"replicaset/{namespace}/{labels.get('replicaset', '')}", above)
        elif name == JOBS:
            self._own(f"job/{namespace}/{labels.get('job_name', '')}", above)
        elif name == TARGETS:
            kind = _OWNERS.get(labels.get("scaletargetref_kind", ""), "")
            target = f"{kind}/{namespace}/{labels.get('scaletargetref_name', '')}" if kind else ""
            self._own(f"autoscaler/{namespace}/{labels.get('horizontalpodautoscaler', '')}", target)
        elif name == MOUNTS:
            claim = f"persistentvolumeclaim/{namespace}/{labels.get('persistentvolumeclaim', '')}"
            self._pods.setdefault(claim, set()).add(f"pod/{namespace}/{labels.get('pod', '')}")
        elif name == CLAIMS:
            claim = f"persistentvolumeclaim/{labels.get('claim_namespace', '')}/{labels.get('name', '')}"
            self._up[claim] = f"persistentvolume/{labels.get('persistentvolume', '')}"
        elif name == NODES and (node := labels.get("node", "")):
            for host in (node, labels.get("internal_ip", "")):
                self._nodes.setdefault(host, node)


def parts(path: str) -> Iterator[tuple[str, str]]:
    """`kind`, `namespace` and `name` of an object that an action may be pointed at; of a node only `node`, its name."""
    kind, _, rest = path.partition("/")
    if kind == "node" and rest:
        yield "node", rest
    if kind in CHANGEABLE and rest.count("/") == 1:
        namespace, _, name = rest.partition("/")
        yield from (("kind", kind), ("namespace", namespace), ("name", name))


def _one(paths: set[str]) -> str:
    return next(iter(paths)) if len(paths) == 1 else ""
