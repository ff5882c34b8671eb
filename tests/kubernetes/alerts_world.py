"""The alerts of kube-prometheus with the objects that they are about: series as kube-state-metrics and cAdvisor expose
them in one real Prometheus, payloads as Alertmanager sends them, and a service that is told of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml
from agent_world import Agent, until
from anyalert_world import LABEL, STEP, RuleOf, Scenario, label_names, rules

from rules.model import Alert

TABLE = Path(__file__).parents[1] / "data" / "kubernetes" / "alerts.yaml"
AFTER = 45 * 60  # for which the fault lasts: longer than any look at it
NOTHING = "no Kubernetes object"
Rows = Iterator[tuple[str, dict[str, str], list[tuple[float, float]]]]


@lru_cache
def table() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(TABLE.read_text())
    return found


@dataclass(frozen=True)
class Expected:
    """One row of the table, filled in for one scenario."""

    cause: str
    owner: str
    proposal: str  # `action key=value ...`, or `none`


@dataclass(frozen=True)
class KubeScenario(Scenario):
    """A simulated cause around real-looking objects; `name` keeps it apart from all others. With an API server nobody
    needs metrics to tell `owners`. The trouble is over at `heals_at`."""

    by_metrics: bool = True
    heals_at: float = math.inf

    @property
    def row(self) -> dict[str, Any]:
        found: dict[str, Any] = table()["alerts"][self.rule.id]
        return found

    @property
    def shape(self) -> dict[str, Any]:
        text = json.dumps(table()["shapes"][self.row["shape"]]).replace("{n}", self.name)
        found: dict[str, Any] = json.loads(text)
        return found

    @property
    def expected(self) -> Expected:
        row = {k: v.replace("{n}", self.name) for k, v in self.row.items()}
        return Expected(row["cause"], "" if row["owner"] == NOTHING else row["owner"], row["proposal"])

    @property
    def until(self) -> float:
        return self.starts_at + AFTER

    @property
    def labels(self) -> dict[str, str]:
        """Of the firing alert: what its rule keeps of the shape's labels."""
        shape: dict[str, str] = self.shape["labels"]
        jobs = self.rule.expression.split('job="')[1:]
        named = {"job": jobs[0].partition('"')[0]} if jobs else {}
        own = {name: f"{name.replace('_', '-')}-{self.name}" for name in label_names(self.rule)}
        if "instance" in own and "instance" not in shape:
            own["instance"] = "10.2.0.9:8443"  # of kube-state-metrics
        kept = {k: v for k, v in shape.items() if k in own or k in ("namespace", "pod")}
        if "namespace" not in shape:
            own.pop("namespace", None)
        found = {**own, **{k: v for k, v in named.items() if k in own}, **kept}
        return {**found, **self.rule.labels, "alertname": self.rule.name}

    @property
    def alert(self) -> Alert:
        labels = self.labels
        return Alert(
            tenant="",
            fingerprint=hashlib.md5(f"{self.rule.id}{self.name}".encode(), usedforsecurity=False).hexdigest()[:16],
            status="firing",
            labels=labels,
            annotations={k: LABEL.sub(lambda m: labels.get(m[1], ""), v) for k, v in self.rule.annotations.items()},
            starts_at=self.starts_at,
            generator_url="http://prometheus-k8s-0:9090/graph?"
            + urlencode({"g0.expr": self.rule.expression, "g0.tab": "1"}),
            digest=self.name,
        )

    def payload(self) -> dict[str, Any]:
        """As Alertmanager's webhook sends it."""
        alert = self.alert
        start = datetime.fromtimestamp(alert.starts_at, UTC).isoformat().replace("+00:00", "Z")
        one = {
            "status": "firing",
            "labels": alert.labels,
            "annotations": alert.annotations,
            "startsAt": start,
            "endsAt": "0001-01-01T00:00:00Z",
            "generatorURL": alert.generator_url,
            "fingerprint": alert.fingerprint,
        }
        return {
            "receiver": "alertmedic",
            "status": "firing",
            "alerts": [one],
            "groupLabels": {"alertname": self.rule.name},
            "commonLabels": alert.labels,
            "commonAnnotations": alert.annotations,
            "externalURL": "http://alertmanager-main-0:9093",
            "version": "4",
            "groupKey": f'{{}}:{{alertname="{self.rule.name}", case="{self.name}"}}',
            "truncatedAlerts": 0,
        }

    @property
    def namespace(self) -> str:
        found: str = self.shape.get("namespace") or self.shape["labels"].get("namespace", "")
        return found

    @property
    def pod(self) -> str:
        found: str = self.shape.get("pod") or self.shape["labels"].get("pod", "")
        return found

    @property
    def node(self) -> str:
        found: str = self.shape.get("node") or self.shape["labels"].get("node", "") or f"worker{self.name}"
        return found

    def _labels(self, metric: str, fixed: dict[str, str]) -> dict[str, str]:
        """What a scrape of that metric is labelled with: the objects that it is about."""
        found = super()._labels(metric, fixed)
        if self.pod and "pod" not in fixed:
            found["pod"] = self.pod
        if self.namespace and "namespace" not in fixed:
            found["namespace"] = self.namespace
        if "node" not in fixed:
            found["node"] = self.node
        return found

    def series(self) -> Rows:
        for metric, labels, samples in (*super().series(), *(self.owners() if self.by_metrics else ())):
            calm = samples[0][1]  # of gauges: what they show before the fault
            healed = [(t, value if t < self.heals_at else calm) for t, value in samples]
            yield metric, labels | {"scenario": self.name}, healed

    def owners(self) -> Rows:
        """What kube-state-metrics says of who owns whom, and of nodes, targets and claims."""
        shape, at = self.shape, {"namespace": self.namespace, "job": "kube-state-metrics", "case": "owner"}
        rows: list[tuple[str, dict[str, str]]] = []
        if chain := [tuple(link.split()) for link in shape.get("chain", [])]:
            below = {"kube_pod_owner": {"pod": self.pod}}
            for kind, name in chain:
                ((metric, names),) = below.items()
                owned = {"owner_kind": kind, "owner_name": name, "owner_is_controller": "true"}
                rows.append((metric, {**at, **names, **owned}))
                if kind == "ReplicaSet":
                    below = {"kube_replicaset_owner": {"replicaset": name}}
                elif kind == "Job":
                    below = {"kube_job_owner": {"job_name": name}}
            rows.append(("kube_pod_info", {**at, "pod": self.pod, "node": self.node, "pod_ip": f"10.7.{self.name}"}))
            scraped = {"job": self.labels.get("job", ""), "service": self.labels.get("service", "")}
            if self.row["shape"].endswith("service"):
                rows.append(("up", {**at, **{k: v for k, v in scraped.items() if v}, "pod": self.pod}))
        if target := shape.get("target"):
            kind, name = target.split()
            more = {"horizontalpodautoscaler": self.labels["horizontalpodautoscaler"]}
            more |= {"scaletargetref_kind": kind, "scaletargetref_name": name}
            rows.append(("kube_horizontalpodautoscaler_info", {**at, **more}))
        if claim := shape.get("claim"):
            volumes = {"pod": self.pod, "persistentvolumeclaim": claim}
            rows.append(("kube_pod_spec_volumes_persistentvolumeclaims_info", {**at, **volumes}))
            if volume := self.labels.get("persistentvolume"):
                held = {"persistentvolume": volume, "claim_namespace": self.namespace, "name": claim}
                rows.append(("kube_persistentvolume_claim_ref", {"job": at["job"], **held}))
        if address := shape.get("address"):
            info = {"node": self.node, "internal_ip": address, "job": at["job"]}
            rows.append(("kube_node_info", info))
        start = (self.fault_at - 75 * 60) // STEP * STEP
        times = [float(t) for t in range(int(start), int(self.until) + STEP, STEP)]
        for metric, labels in rows:
            yield metric, labels, [(t, 1.0) for t in times]


def scenario(rule: RuleOf, starts_at: float, **more: Any) -> KubeScenario:
    number = list(rules()).index(rule)
    name = more.pop("name", f"{number // 100}.{number % 100}")  # two bytes of an address
    return KubeScenario(name, rule, table()["alerts"][rule.id]["cause"], starts_at, **more)


@dataclass
class KubeAgent(Agent):
    """The service as an operator would start it beside a Prometheus; `extra` is more configuration."""

    step_seconds: int = STEP

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "alertmedic.yaml").write_text(
            f"""
listen: 127.0.0.1:{self.port}
state_dir: {self.directory / "state"}
prometheus:
  {{url: "{self.prometheus}", step_seconds: {self.step_seconds}, rate_seconds: {4 * STEP}, timeout_seconds: 60}}
merge: {{window_seconds: 0}}
investigate: {{rounds: 1}}
autonomy: {{default: {self.autonomy}}}
{self.extra}
"""
        )

    def diagnosed(self, payloads: list[dict[str, Any]], seconds: float) -> dict[str, dict[str, Any]]:
        """Posts each payload and waits for its diagnosis: fingerprint -> the incident as the API tells it."""
        for payload in payloads:
            status, answer = self.request("POST", "/webhook", payload)
            assert status == 200, answer
        wanted = {payload["alerts"][0]["fingerprint"] for payload in payloads}
        found: dict[str, dict[str, Any]] = {}

        def all_told() -> bool:
            for incident in self.incidents():
                if incident["id"] in seen or incident["state"] in ("open", "investigating"):
                    continue
                status, told = self.request("GET", f"/api/v1/incidents/{incident['id']}")
                if status == 200 and told["verdict"] is not None:
                    seen.add(incident["id"])
                    found.update({alert["fingerprint"]: told for alert in told["alerts"]})
            return wanted <= set(found)

        seen: set[str] = set()
        until(all_told, f"{len(wanted)} incidents are diagnosed", seconds)
        return found
