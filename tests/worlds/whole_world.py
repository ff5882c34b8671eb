"""A whole incident over a known past: a real journal, the real investigation, a real Prometheus (or what stands in its
place), and a clock that stands at the end of that past."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from actions.model import Declined, Refusal
from agent.config import Config, Prometheus, Topology
from agent.expressions import Expressions, rules_of
from agent.fold_model import Incident
from agent.investigate import Investigation
from agent.journal.records import AgentStarted, AlertsReceived, FoldPolicy
from agent.packs import load_packs
from agent.situation import Situations
from agent.sources import EvidenceRequest, Source, SourceError
from agent.sources.prometheus import PrometheusSource
from agent.store import Store
from agent.telemetry import Telemetry
from agent.topology import load_topology
from bench.backfill import EDGES, Past
from rules.model import Alert, Evidence
from rules.packs import PackSet

Program = Callable[[str, str], str]


@dataclass(frozen=True)
class Shop:
    """A server over a known past, and the directory of its blocks."""

    past: Past
    url: str
    data: Path


class NoHost:
    """The machine of the tests is not the machine of the incident."""

    name = "host"

    async def fetch(self, request: EvidenceRequest, deadline_seconds: float) -> tuple[Evidence, ...]:
        raise SourceError("not the host of the incident")


class NothingToDo:
    async def consider(self, incident: Incident) -> Declined:
        return Declined(reason=Refusal.NO_PROPOSAL, detail="nothing is done in this test")


def configuration(url: str, state_dir: Path, **prometheus: object) -> Config:
    kinds = {"front": "http", "orders": "http", "payments": "http"}
    section = Prometheus(url=url, step_seconds=15.0, **prometheus)  # type: ignore[arg-type]
    topology = Topology(edges={k: tuple(v) for k, v in EDGES.items()}, kinds=kinds)  # type: ignore[arg-type]
    return Config(state_dir=state_dir, prometheus=section, topology=topology)


@dataclass
class Whole:
    """One journal and one investigation. `sources` answer for what the packs ask."""

    config: Config
    past: Past
    sources: Sequence[Source]
    packs: PackSet = field(default_factory=lambda: load_packs())

    def __post_init__(self) -> None:
        self.store = Store.open(self.config.state_dir)
        self.telemetry = Telemetry("test")
        asked = [s for s in self.sources if isinstance(s, PrometheusSource)]
        self.situations = Situations(
            self.config,
            self.packs,
            self.sources,
            load_topology(self.config),
            clock=lambda: float(self.past.end),
            expressions=Expressions(rules_of(asked[0])) if asked else Expressions(),
        )
        self.investigation = Investigation(
            self.config,
            self.packs,
            self.store,
            self.situations,
            NothingToDo(),  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            self.telemetry,
            lambda id, at: None,
            clock=lambda: float(self.past.end),
        )

    async def alert(self, service: str = "front", name: str = "HighLatency") -> str:
        """A firing alert of that service becomes durable; the incident's id."""
        at = float(self.past.onset + 120)
        if self.store.state.started is None:
            started = AgentStarted(at=at, version="t", pid=1, sandbox="none", autonomy="suggest", policy=FoldPolicy())
            await self.store.record(started)
        alert = Alert(
            tenant="default",
            fingerprint=f"{name}{service}",
            status="firing",
            labels={"alertname": name, "service": service},
            starts_at=at,
            digest=f"{name}{service}{self.store.state.seq}",
        )
        received = AlertsReceived(at=at, tenant="default", receiver="r", group_key=name + service, alerts=(alert,))
        await self.store.record(received)
        current = self.store.state.current("default", alert.fingerprint)
        assert current is not None
        return current.incident

    async def diagnosed(self, id: str) -> Incident:
        """The incident after one look at the evidence."""
        await self.investigation.advance(id)
        incident = self.store.state.incident(id)
        assert incident is not None
        assert incident.diagnosis is not None, [line.text for line in incident.story]
        return incident

    async def close(self) -> None:
        await self.store.close()
