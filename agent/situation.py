"""What the world looks like around one incident: the frozen `Situation` that diagnosis and verification look at.

Called by `agent.investigate` (everything the packs ask for) and `agent.verify` (only the signals that justified an
action). Exists so that a live incident, a recorded one and a second look after an action are made in one way. It never
decides: what could not be had is in the evidence as `missing`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from agent.changes import NAME as CHANGES
from agent.changes import Deploys
from agent.config import Config
from agent.dependency import Answer, Dependency
from agent.expressions import Expressions, Told
from agent.fold_changes import facts
from agent.fold_model import Incident
from agent.fold_state import State
from agent.history import Archive
from agent.sources import Budget, EvidenceRequest, Source, bounded, gather
from agent.sources.kubernetes import EVIDENCE as OBJECTS
from agent.systems import Systems
from rules.anyalert import questions
from rules.diagnose import moved
from rules.expression import ExpressionError, read
from rules.model import Alert, Evidence, Fact, Situation, Topology
from rules.owners import owner_queries
from rules.packs import EvidenceQuery, PackSet
from rules.subjects import EXPRESSION_FACT, entry_of, kind_of, subject_of

DISCOVERY_SECONDS = 300.0  # how long a topology that was read from metrics is believed
NOTHING = "vector(0)"  # stands for an expression that is not known: only the labels are asked about
LONGEST = 4  # windows that a look reaches back for something to compare with, where earlier trouble fills the first
MOST_STEPS = 10_000  # of such a look; Prometheus answers 11,000 at most
HOLD_COUNTS = 60.0  # a shorter `for` lies within the onset's margin
UNREACHED = 5.0  # seconds after which a discovery that failed is tried again


@dataclass(frozen=True, slots=True)
class About:
    """What an incident is about: its alerts, the node where it was seen, the causes that packs name for these alerts,
    for how long the trouble had lasted when the first of them fired, and what is known of their rules."""

    alerts: tuple[Alert, ...]
    entry: str
    causes: frozenset[str]
    hold_seconds: float
    told: Mapping[str, Told]
    tenant: str
    seconds: float = 0.0  # that finding this out took, of the one deadline for all evidence


@dataclass(slots=True)
class Situations:
    """Makes situations. `discover` asks metrics who calls whom (None: only the configured topology)."""

    config: Config
    packs: PackSet
    sources: Sequence[Source]
    topology: Topology
    discover: Callable[[float], Awaitable[Topology]] | None = None
    clock: Callable[[], float] = time.time
    expressions: Expressions = field(default_factory=Expressions)
    discovery: Dependency[Topology] = field(default_factory=lambda: Dependency("topology"))
    systems: Systems | None = None  # which services have which of the metrics that packs go by; None: nobody says
    topology_state: str = field(default="static: what is configured", init=False)  # for people
    _known: Topology | None = field(default=None, init=False)
    _known_until: float = field(default=0.0, init=False)

    @property
    def topology_known(self) -> Topology:
        """Who calls whom, by what is configured and was last discovered; asks nobody."""
        return self._known or self.topology

    def entry(self, alerts: Sequence[Alert], told: Mapping[str, Told]) -> str:
        """The node where the trouble was seen: the first configured label that names a service of the topology; else
        what a pack knows the alert to be about; else the first configured label that is there at all, or the most
        specific thing that the labels name. "" without alerts."""
        services = set(self.topology.services())
        named = [value for a in alerts for n in self.config.service_labels if (value := a.labels.get(n, ""))]
        for value in named:
            if value in services:
                return value
        for alert in alerts:
            known = entry_of(alert.labels, _metrics(told.get(alert.fingerprint, Told())), self.packs.alerts)
            if known is not None:
                return subject_of(alert.labels, known.subject)
        return named[0] if named else next((subject_of(alert.labels) for alert in alerts), "")

    async def of(self, incident: Incident, state: State) -> Situation:
        """Everything the packs ask for, up to now. The window begins `prometheus.window_seconds` before the alert
        started; what lies less than `prometheus.onset_margin_seconds` before the start is already abnormal, since an
        alert fires only after its rate window and its `for` have passed; the rule's `for`, where it is known and at
        least a minute, is taken into account exactly."""
        prometheus = self.config.prometheus
        now = self.clock()
        about = await self._about(incident)
        onset = min(incident.onset, now) - prometheus.onset_margin_seconds - about.hold_seconds
        start = self._start(incident, state, onset)
        topology = await self._topology(now)
        look = Situation(about.alerts, about.entry, onset, now, topology=topology, configured=self._configured)
        told = facts(state.changes, incident.tenant, onset, now)
        look = await self._look(about, look, start)
        if told:
            look = replace(look, evidence=(*look.evidence, Evidence(CHANGES, "journal", facts=told)))
        looked_at = [(start, onset), *((start - h.offset, now - h.offset) for h in look.history)]
        windows = [
            (begin, end)
            for first, last in looked_at
            for begin, end in self._quiet(incident, state, first, last)
            # An alert that fired all the time before (for days, or nobody told that it resolved) is how things are: to
            # leave that out would leave nothing to compare with.
            if first != start or begin > first or end < last
        ]
        return replace(look, quiet=tuple(sorted(set(windows))))

    def _quiet(self, incident: Incident, state: State, first: float, last: float) -> list[tuple[float, float]]:
        """The trouble of other incidents of its services within [first, last], and its own since it was opened: an
        alert that comes and goes starts anew each time, while what is wrong stays. It began before its alert fired, and
        left the rate windows after it had ended, as this one does."""
        before, after = self.config.prometheus.onset_margin_seconds, self.config.prometheus.rate_window_seconds
        windows = [
            (max(begin - before, first), min(end + after, last))
            for service in incident.services or [""]
            for begin, end in state.quiet_windows(service, first - after, last, without=incident.id)
        ]
        if 0.0 < incident.began_at < incident.onset:
            windows.append((max(incident.began_at - before, first), min(incident.onset, last)))
        return [(begin, end) for begin, end in windows if begin < end]

    def _start(self, incident: Incident, state: State, onset: float) -> float:
        """Where the look begins: a window before the onset, and earlier, LONGEST windows at most, while earlier trouble
        leaves less than half a window to compare with. Trouble that lasted longer than that is how things are."""
        window = self.config.prometheus.window_seconds
        most = max(window, min(LONGEST * window, MOST_STEPS * self.config.prometheus.step_seconds))
        start, least = onset - window, onset - most
        quiet = self._quiet(incident, state, least, onset)
        while start > least:
            lacking = window / 2.0 - _free(quiet, start, onset)
            if lacking <= 0.0:
                return start
            start = max(start - max(lacking, window / 10.0), least)
        return start if _free(quiet, start, onset) > window / 10.0 else onset - window

    async def around(self, alerts: Sequence[Alert], tenant: str = "") -> Situation:
        """What `of` gives for an incident of these alerts that nothing else is known of."""
        prometheus = self.config.prometheus
        now = self.clock()
        firing = [alert for alert in alerts if alert.status == "firing"]
        about = await self.about(tuple(alerts), firing or alerts, tenant)
        began = min((alert.starts_at for alert in firing or alerts), default=now)
        onset = min(began, now) - prometheus.onset_margin_seconds - about.hold_seconds
        topology = await self._topology(now)
        look = Situation(about.alerts, about.entry, onset, now, topology=topology, configured=self._configured)
        return await self._look(about, look, onset - prometheus.window_seconds)

    async def since(self, incident: Incident, names: Collection[str], start: float) -> Situation:
        """Only the signals `names`, from `start` to now: what a verdict on recovery needs."""
        now = self.clock()
        about = await self._about(incident)
        topology = await self._topology(now)
        request = await self._request(about, topology, (min(start, now), now), names)
        evidence = await self._gather(about, request)
        return Situation(
            alerts=about.alerts,
            entry=about.entry,
            onset=start,
            until=now,
            evidence=evidence,
            topology=topology,
        )

    async def _about(self, incident: Incident) -> About:
        every = tuple(incident.alerts.values())
        return await self.about(every, incident.firing or every, incident.tenant)

    async def about(self, alerts: tuple[Alert, ...], firing: Sequence[Alert], tenant: str) -> About:
        """What an incident of these alerts is about."""
        tenant = self.config.prometheus.tenant or tenant
        began = time.monotonic()
        told = await self.expressions.of(alerts, tenant, self.config.prometheus.timeout_seconds / 3.0)
        entries = [entry_of(a.labels, _metrics(told[a.fingerprint]), self.packs.alerts) for a in alerts]
        hold = min((t.hold_seconds for t in told.values()), default=0.0)
        return About(
            alerts=alerts,
            entry=self.entry(firing, told),
            causes=frozenset(cause for entry in entries if entry is not None for cause in entry.causes),
            hold_seconds=hold if hold >= HOLD_COUNTS else 0.0,
            told=told,
            tenant=tenant,
            seconds=time.monotonic() - began,
        )

    async def _look(self, about: About, look: Situation, start: float) -> Situation:
        """The look with its evidence from `start` on, and with what the store holds of the same time before. Whether it
        reaches back is asked beside the evidence; all of it has one deadline and one budget."""
        began = time.monotonic()
        request = await self._request(about, look.topology, (start, look.until))
        archive = Archive.of(self.sources, self.config.prometheus.history_seconds)
        deploys = Deploys.of(self.sources, self.packs) if request.services else None
        seconds = self._seconds(about)
        async with asyncio.TaskGroup() as group:
            reach = group.create_task(archive.reaches(look.onset, about.tenant, seconds)) if archive else None
            changing = group.create_task(deploys.ask(request, look.onset, seconds)) if deploys else None
            gathering = group.create_task(self._gather(about, request))
        evidence = (*gathering.result(), *([changing.result()] if changing else []))
        look = replace(look, evidence=evidence)
        if archive is None or reach is None or not reach.result():
            return look
        names = await asyncio.to_thread(moved, look, self.packs)
        limits = self.config.investigate
        frames = [evidence.frame for evidence in look.evidence]
        budget = Budget(
            max(limits.max_queries - len(request.queries), 0),
            max(limits.max_series - sum(len(f.ids) for f in frames), 0),
            max(limits.max_samples - sum(f.values.size for f in frames), 0),
        )
        left = seconds - (time.monotonic() - began)
        history, missing = await archive.of_look(request, names, reach.result(), look.onset, budget, left)
        return replace(look, evidence=(*look.evidence, *missing), history=history)

    @property
    def _configured(self) -> frozenset[str]:
        """What proposals may need of the configuration."""
        kubernetes = self.config.kubernetes
        return frozenset(f"diagnostic/{name}" for name in kubernetes.diagnostics if kubernetes.enabled)

    def _seconds(self, about: About) -> float:
        """What is left of the one deadline for all evidence."""
        seconds = self.config.prometheus.timeout_seconds
        return max(seconds - about.seconds, seconds / 2.0)

    async def _request(
        self, about: About, topology: Topology, window: tuple[float, float], names: Collection[str] | None = None
    ) -> EvidenceRequest:
        """What the packs ask of the services reachable from the entry and about the alerts, `names` only if given."""
        entry = about.entry
        reachable = topology.paths_from(entry) if entry in topology.services() else ()
        named = {*reachable, entry} if not kind_of(entry) else set(reachable)
        services = tuple(sorted(named - {""})) or topology.services()
        queries = [q for q in self.packs.asked(about.causes) if names is None or q.name in names]
        if kind_of(entry) and not services:  # no service is involved, so nothing is asked of services
            queries = [q for q in queries if "$alert(" in q.query]
        if not any(source.name == "kubernetes" for source in self.sources):
            queries = [q for q in queries if q.source != "kubernetes"]
        elif names is None and OBJECTS not in {q.name for q in queries}:
            queries.append(EvidenceQuery(name=OBJECTS, query="", source="kubernetes"))
        if names is None:
            queries += [q for alert in about.alerts[:1] for q in owner_queries(entry, alert.labels)]
        beyond = await self._beyond(about, topology, services) if entry and not kind_of(entry) else ()
        scopes = {q.name: of for q, of in beyond if names is None or q.name in names}
        queries += [q for q, _ in beyond if q.name in scopes]
        if self.packs.fallback_causes:
            queries += [q for q in _questions(about) if names is None or q.name in names]
        return EvidenceRequest(
            queries=tuple(queries),
            services=services,
            start=window[0],
            end=window[1],
            step=self.config.prometheus.step_seconds,
            tenant=about.tenant,
            alerts=tuple(dict(alert.labels) for alert in about.alerts),
            scopes=scopes,
        )

    async def _gather(self, about: About, request: EvidenceRequest) -> tuple[Evidence, ...]:
        limits = self.config.investigate
        budget = Budget(limits.max_queries, limits.max_series, limits.max_samples)
        evidence = await gather(self.sources, request, self._seconds(about), budget)
        return (*evidence, *_expressions(about))

    async def _beyond(
        self, about: About, topology: Topology, services: Collection[str]
    ) -> tuple[tuple[EvidenceQuery, tuple[str, ...]], ...]:
        """What is asked of the systems among these services, and of the hosts below them; whatever the alert."""
        if self.systems is None or not services or not self.packs.reached_by:
            return ()
        known = await self.systems(self.packs.reached_by, self.config.prometheus.timeout_seconds / 3.0)
        has = {service: set(known[service]) for service in services if service in known}
        for caller, callee in topology.edges:
            if caller in has and topology.kinds.get(callee) == "host":
                has.setdefault(callee, set()).update(has[caller])
        return self.packs.asked_beyond(about.causes, has)

    async def _topology(self, now: float) -> Topology:
        discover = self.discover
        if discover is None:
            return self.topology
        if self._known is None or now >= self._known_until:
            answer = await self.discovery.ask(lambda: self._discovered(discover), static=Topology())
            found = answer.value or Topology()
            self.topology_state = _said(answer)
            self._known_until = self.clock() + (DISCOVERY_SECONDS if answer.source == "live" else UNREACHED)
            if answer.source == "live" or self._known is None:  # an outage is no reason to forget who calls whom
                edges = tuple(sorted({*self.topology.edges, *found.edges}))
                self._known = Topology(edges=edges, kinds={**found.kinds, **self.topology.kinds})
        return self._known

    async def _discovered(self, discover: Callable[[float], Awaitable[Topology]]) -> Topology:
        """One deadline for all of its queries, which it asks one after the other. A graph without edges is no answer:
        metrics are silent, or nobody traces."""
        seconds = self.config.prometheus.timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                found = await discover(seconds)
        except TimeoutError as error:
            raise LookupError(f"topology: no answer within {seconds:g} s") from error
        if not found.edges:
            raise LookupError("topology: metrics tell no edges")
        return found


def _free(windows: Iterable[tuple[float, float]], first: float, last: float) -> float:
    """Seconds of [first, last] that lie in none of the windows."""
    free, reached = 0.0, first
    for begin, end in sorted(windows):
        free += max(0.0, min(begin, last) - reached)
        reached = max(reached, end)
    return free + max(0.0, last - reached)


def _said(answer: Answer[Topology]) -> str:
    """Where the graph comes from, for people: live, stale since when, or configured only, and why."""
    if answer.source == "live":
        return "live"
    since = f" since {datetime.fromtimestamp(answer.at, UTC).isoformat(timespec='seconds')}"
    return f"{answer.source}{since if answer.source == 'stale' else ''}: {answer.reason}"


def _metrics(told: Told) -> tuple[str, ...]:
    """The metrics that an alert's expression reads, as far as it can be read."""
    try:
        return read(told.expression).metrics if told.expression else ()
    except ExpressionError:
        return ()


def _questions(about: About) -> tuple[EvidenceQuery, ...]:
    """The correlated queries of the alert that the incident begins with, of those whose expression can be read."""
    for alert in sorted(about.alerts, key=lambda alert: (alert.status != "firing", alert.starts_at)):
        told = about.told[alert.fingerprint]
        try:
            expression = read(told.expression or NOTHING)
        except ExpressionError:
            expression = read(NOTHING)
        return questions(alert.labels, expression, told.rule_labels)
    return ()


def _expressions(about: About) -> tuple[Evidence, ...]:
    """The alerts' expressions as facts: what packs match by, and what a recording needs to be matched again. An alert
    whose expression is unknown or unreadable makes missing evidence, once."""
    facts: list[Fact] = []
    reasons: dict[str, str] = {}
    for alert in about.alerts:
        told = about.told[alert.fingerprint]
        try:
            if told.missing is not None:
                raise ExpressionError(told.missing)
            expression = read(told.expression)
        except ExpressionError as error:
            reasons.setdefault(alert.name, f"{bounded(alert.name, 80)}: {bounded(str(error))}")
            continue
        attributes = {"expression": told.expression, "metrics": " ".join(expression.metrics)}
        facts.append(Fact(EXPRESSION_FACT, alert.fingerprint, "", attributes))
    missing = bounded("; ".join(reasons.values()))
    found = [Evidence(EXPRESSION_FACT, "alert", facts=tuple(facts))] if facts else []
    return (*found, *([Evidence(EXPRESSION_FACT, "alert", missing=missing)] if missing else []))
