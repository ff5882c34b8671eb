"""What the world looks like around one incident: the frozen `Situation` that diagnosis and verification look at.

Called by `agent.investigate` (everything the packs ask for) and `agent.verify` (only the signals that justified an
action). Exists so that a live incident, a recorded one and a second look after an action are made in one way. It never
decides: what could not be had is in the evidence as `missing`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

from agent.config import Config
from agent.fold_model import Incident
from agent.fold_state import State
from agent.sources import EvidenceRequest, Source, gather
from rules.model import Evidence, Situation, Topology
from rules.packs import EvidenceQuery, PackSet

DISCOVERY_SECONDS = 300.0  # how long a topology that was read from metrics is believed
UNREACHED = 5.0  # seconds after which a discovery that failed is tried again


@dataclass(slots=True)
class Situations:
    """Makes situations. `discover` asks metrics who calls whom (None: only the configured topology)."""

    config: Config
    packs: PackSet
    sources: Sequence[Source]
    topology: Topology
    discover: Callable[[float], Awaitable[Topology]] | None = None
    clock: Callable[[], float] = time.time
    _known: Topology | None = field(default=None, init=False)
    _known_until: float = field(default=0.0, init=False)

    def entry(self, incident: Incident) -> str:
        """The service where the trouble was seen: the first configured label that names a service of the topology, or
        else the first one that is there at all."""
        services = set(self.topology.services())
        named: list[str] = []
        for alert in incident.firing or tuple(incident.alerts.values()):
            for label in self.config.service_labels:
                value = alert.labels.get(label, "")
                if value in services:
                    return value
                if value:
                    named.append(value)
        return named[0] if named else ""

    async def of(self, incident: Incident, state: State) -> Situation:
        """Everything the packs ask for, up to now. The window begins `prometheus.window_seconds` before the alert
        started; what lies less than `prometheus.onset_margin_seconds` before the start is already abnormal, since an
        alert fires only after its rate window and its `for` have passed."""
        prometheus = self.config.prometheus
        now = self.clock()
        onset = min(incident.onset, now) - prometheus.onset_margin_seconds
        start = min(onset, now) - prometheus.window_seconds
        entry = self.entry(incident)
        topology = await self._topology(now)
        evidence = await self._gather(self.packs.queries(), entry, topology, (start, now), incident.tenant)
        # Earlier trouble began before its alert fired, and left the rate windows after it had ended, as this one does.
        before, after = prometheus.onset_margin_seconds, prometheus.rate_window_seconds
        windows = [
            (max(begin - before, start), min(end + after, onset))
            for service in incident.services or [""]
            for begin, end in state.quiet_windows(service, start - after, onset, without=incident.id)
        ]
        return Situation(
            alerts=tuple(incident.alerts.values()),
            entry=entry,
            onset=onset,
            until=now,
            evidence=evidence,
            topology=topology,
            quiet=tuple(sorted({window for window in windows if window[0] < window[1]})),
        )

    async def since(self, incident: Incident, names: Collection[str], start: float) -> Situation:
        """Only the signals `names`, from `start` to now: what a verdict on recovery needs."""
        now = self.clock()
        entry = self.entry(incident)
        topology = await self._topology(now)
        queries = tuple(q for q in self.packs.queries() if q.name in names)
        evidence = await self._gather(queries, entry, topology, (min(start, now), now), incident.tenant)
        return Situation(
            alerts=tuple(incident.alerts.values()),
            entry=entry,
            onset=start,
            until=now,
            evidence=evidence,
            topology=topology,
        )

    async def _gather(
        self,
        queries: tuple[EvidenceQuery, ...],
        entry: str,
        topology: Topology,
        window: tuple[float, float],
        tenant: str,
    ) -> tuple[Evidence, ...]:
        reachable = topology.paths_from(entry) if entry in topology.services() else ()
        services = tuple(sorted({*reachable, entry} - {""})) or topology.services()
        prometheus = self.config.prometheus
        request = EvidenceRequest(
            queries=queries,
            services=services,
            start=window[0],
            end=window[1],
            step=prometheus.step_seconds,
            tenant=prometheus.tenant or tenant,
        )
        return await gather(self.sources, request, prometheus.timeout_seconds)

    async def _topology(self, now: float) -> Topology:
        if self.discover is None:
            return self.topology
        if self._known is None or now >= self._known_until:
            found = await self._discovered(self.discover)
            self._known_until = self.clock() + (DISCOVERY_SECONDS if found.edges else UNREACHED)
            if found.edges or self._known is None:  # an outage is no reason to forget who calls whom
                edges = tuple(sorted({*self.topology.edges, *found.edges}))
                self._known = Topology(edges=edges, kinds={**found.kinds, **self.topology.kinds})
        return self._known

    async def _discovered(self, discover: Callable[[float], Awaitable[Topology]]) -> Topology:
        """One deadline for all of its queries, which it asks one after the other; nothing when it is over."""
        seconds = self.config.prometheus.timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                return await discover(seconds)
        except TimeoutError:
            return Topology()
