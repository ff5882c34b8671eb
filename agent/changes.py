"""What was changed shortly before an incident, as far as metrics tell: new versions, rollouts, restarts.

Called by `agent.situation` beside the evidence, with what people and pipelines said (`agent.fold_changes`). Exists
because a change has a time and a service, which a count of versions has not. Four queries over the services of the
look, from six hours before the onset:

* versions: labels `version` and `revision` of `*_build_info`, `service_version` of `target_info`;
* images of the containers that are named as the services, by kube-state-metrics;
* the creation of a Deployment's replica sets, by kube-state-metrics: exact, and a mere scaling makes none;
* the newest start of a service's processes.

A value that was not there before and whose service was is a change of kind `change.deploy`; a start is
`change.restart`. What did not arrive is missing evidence; nothing here judges.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from agent.sources import EvidenceRequest, Source, bounded
from agent.sources.prometheus import PrometheusSource, QueryError
from agent.sources.promql import TemplateError, matcher
from rules.model import Evidence, Fact, FloatArray, Frame
from rules.packs import PackSet

NAME = "changes"  # of the evidence
BEFORE_SECONDS = 6 * 3600.0
MAX_POINTS = 360
MAX_FACTS = 100  # the newest
_VERSION_LABELS = ("version", "service_version", "revision", "image")


@dataclass(frozen=True, slots=True)
class Deploys:
    """Asks one Prometheus for the changes of a look's services."""

    source: PrometheusSource

    @classmethod
    def of(cls, sources: Sequence[Source], packs: PackSet) -> Deploys | None:
        """None where nobody can be asked, or no pack would look at the answer."""
        source = next((s for s in sources if isinstance(s, PrometheusSource)), None)
        wanted = any(g.facts is not None and g.facts.evidence == NAME for g in packs.groups.values())
        return cls(source) if source is not None and wanted else None

    async def ask(self, request: EvidenceRequest, onset: float, deadline_seconds: float) -> Evidence:
        """The changes until the end of the look, newest first. The request names services. Raises nothing."""
        label = self.source.config.service_label
        try:
            own = matcher(label, request.services)
            container, owner = (matcher(name, request.services) for name in ("container", "owner_name"))
        except TemplateError as error:
            return Evidence(NAME, NAME, missing=bounded(str(error)))
        by = f"{label}, version, service_version, revision"
        ranges = {
            label: f'count by ({by}) ({{__name__=~".+_build_info|target_info",{own}}})',
            "container": f"count by (container, image) (kube_pod_container_info{{{container}}})",
        }
        owners = f'kube_replicaset_owner{{owner_kind="Deployment",{owner}}}'
        sets = f"max by (namespace, replicaset, owner_name) ({owners})"
        instants = {
            "owner_name": "max by (owner_name) (max by (namespace, replicaset) (kube_replicaset_created)"
            f" * on (namespace, replicaset) group_left (owner_name) {sets})",
            label: f"max by ({label}) (process_start_time_seconds{{{own}}})",
        }
        begin = onset - BEFORE_SECONDS
        window = (begin, request.end, max(request.step, (request.end - begin) / MAX_POINTS))
        async with asyncio.TaskGroup() as group:
            seen = [
                (where, group.create_task(self._range(query, window, request.tenant, deadline_seconds)))
                for where, query in ranges.items()
            ]
            made = [
                (where, group.create_task(self._instant(query, request, deadline_seconds)))
                for where, query in instants.items()
            ]
        failed = [str(r) for _, task in (*seen, *made) if isinstance(r := task.result(), QueryError)]
        if len(failed) == len(seen) + len(made):
            return Evidence(NAME, NAME, missing=bounded(failed[0]))
        facts: list[Fact] = []
        for where, task in seen:
            if isinstance(frame := task.result(), Frame):
                facts += _appeared(frame, where)
        for where, asked in made:
            if isinstance(starts := asked.result(), dict):
                known = {service: at for service, at in starts.items() if begin <= at <= request.end}
                kind, what = ("deploy", "rollout") if where == "owner_name" else ("restart", "restart")
                facts += [_fact(kind, what, service, at) for service, at in known.items()]
        facts.sort(key=lambda f: (-float(f.attributes["time"]), f.kind, f.service, f.subject))
        partial = bounded(f"{len(failed)} of {len(seen) + len(made)} queries: {failed[0]}") if failed else ""
        return Evidence(NAME, NAME, facts=tuple(facts[:MAX_FACTS]), partial=partial)

    async def _range(
        self, query: str, window: tuple[float, float, float], tenant: str, seconds: float
    ) -> Frame | QueryError:
        try:
            answer = await self.source.query_range(query, window, name=NAME, tenant=tenant, deadline_seconds=seconds)
        except QueryError as error:
            return error
        return answer[0]

    async def _instant(self, query: str, request: EvidenceRequest, seconds: float) -> dict[str, float] | QueryError:
        """The value by the one label that the query leaves."""
        try:
            found, _ = await self.source.query_instant(
                query, at=request.end, tenant=request.tenant, deadline_seconds=seconds
            )
        except QueryError as error:
            return error
        return {next(iter(sample.labels.values()), ""): sample.value for sample in found}


def _appeared(frame: Frame, label: str) -> Iterator[Fact]:
    """A change for each version that a service has from some time on and had not right before, while it had another. A
    service that was not seen before is no change, nor one that comes back as it was."""
    by_service: dict[str, list[tuple[str, FloatArray]]] = {}
    for series, row in zip(frame.ids, frame.values, strict=True):
        version = " ".join(v for name in _VERSION_LABELS if (v := series.label(name)))
        service = series.label("service") or series.label(label)
        if version and service:
            by_service.setdefault(service, []).append((version, row))
    for service, versions in sorted(by_service.items()):
        there = {version: np.isfinite(row) for version, row in versions}
        current: frozenset[str] = frozenset()
        for i, at in enumerate(frame.times.tolist()):
            now = frozenset(version for version, seen in there.items() if seen[i])
            for version in sorted(now - current) if current else ():
                before = ", ".join(sorted(current))
                yield _fact("deploy", version, service, float(at), previous=bounded(before, 200))
            current = now or current


def _fact(kind: str, subject: str, service: str, at: float, **more: str) -> Fact:
    return Fact(f"change.{kind}", bounded(subject, 200), service, {"time": at, "told_by": "metrics", **more})
