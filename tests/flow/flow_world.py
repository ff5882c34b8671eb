"""An investigation over a real store, with fakes where it meets the world: evidence, the verifier, and remediation."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actions import guard
from actions.model import Declined, Plan, Refusal, Step, StepMoved, StepState
from actions.runner import PlanOutcome
from agent.config import Config
from agent.fold_model import Incident
from agent.investigate import Investigation
from agent.journal.records import AgentStarted, AlertsReceived, FoldPolicy, IncidentMoved, PlanMade, StepRecorded
from agent.store import Store
from agent.telemetry import Telemetry
from rules.model import Alert, AlertStatus, Situation, Topology
from rules.packs import PackSet
from rules.verify import Justification, Verdict, WatchedSeries

NOW = 1_800_000_000.0
WATCHED = WatchedSeries(metric="m", role="symptom", direction="up", baseline=0.0, scale=1.0, threshold=1.0)
JUSTIFIED = Justification(entry="front", service="front", cause="c", onset=NOW, series=(WATCHED,))


async def nothing() -> None:
    pass


@dataclass
class Situations:
    """Nothing is to be had. `during` happens while it is being looked for."""

    during: Callable[[], Awaitable[None]] = nothing
    topology_known = Topology()

    async def of(self, incident: Incident, state: object) -> Situation:
        await self.during()
        return Situation(alerts=(), entry="front", onset=NOW, until=NOW, evidence=(), topology=Topology())


@dataclass
class Verifier:
    verdict: Verdict = field(default_factory=lambda: Verdict(recovered=True, text="all is well"))
    during: Callable[[], Awaitable[None]] = nothing
    situations: Situations = field(default_factory=Situations)
    since: list[float] = field(default_factory=list)

    async def look(self, incident: Incident, since: float) -> Verdict:
        self.since.append(since)
        await self.during()
        return self.verdict

    async def judged(self, incident: Incident, justification: Justification, since: float) -> Verdict:
        return await self.look(incident, since)


@dataclass
class Remediation:
    """`run` gives `outcome`, or raises it."""

    plan: Plan | Declined = field(default_factory=lambda: Declined(reason=Refusal.NO_PROPOSAL))
    outcome: PlanOutcome | Exception = field(default_factory=lambda: RuntimeError("unset"))
    refusal: Declined | None = None

    def recheck(self, incident: Incident) -> Declined | None:
        return self.refusal

    def differs(self, waiting: Plan, fresh: Plan) -> str:
        return guard.differs(waiting, fresh, None)

    async def consider(self, incident: Incident) -> Plan | Declined:
        return self.plan

    async def run(self, incident: Incident, cancelled: object) -> PlanOutcome:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@dataclass
class World:
    """One store and one investigation; `wakes` is when it wanted to be woken, by incident."""

    store: Store
    situations: Situations = field(default_factory=Situations)
    verifier: Verifier = field(default_factory=Verifier)
    remediation: Remediation = field(default_factory=Remediation)
    telemetry: Telemetry = field(default_factory=lambda: Telemetry("test"))
    config: Config = field(default_factory=Config)
    now: float = NOW
    wakes: list[tuple[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.investigation = Investigation(
            self.config,
            PackSet.of(()),
            self.store,
            self.situations,  # type: ignore[arg-type]
            self.remediation,  # type: ignore[arg-type]
            self.verifier,  # type: ignore[arg-type]
            self.telemetry,
            lambda id, at: self.wakes.append((id, at)),
            clock=lambda: self.now,
        )

    async def alert(self, status: AlertStatus = "firing", name: str = "Slow", **more: Any) -> str:
        """Records one alert and gives its incident's id."""
        made = Alert(
            tenant="default",
            fingerprint=name,
            status=status,
            labels={"alertname": name, "service": "front"},
            starts_at=NOW - 60,
            digest=f"{name}/{status}/{self.store.state.seq}",
            **more,
        )
        record = AlertsReceived(at=self.now, tenant="default", receiver="r", group_key="g", alerts=(made,))
        await self.store.record(record)
        current = self.store.state.current("default", name)
        assert current is not None
        return current.incident

    async def moved(self, id: str, *states: str) -> None:
        for after in states:
            before = self.incident(id).state
            await self.store.record(IncidentMoved(at=self.now, incident=id, before=before, after=after))

    async def acting(self, name: str = "Slow", steps: int = 1, *, read_only: bool = False) -> str:
        """An incident whose plan was granted and has not begun."""
        id = await self.alert(name=name)
        await self.moved(id, "investigating", "diagnosed")
        plan = Plan(
            id=f"plan-{id}",
            incident=id,
            service="front",
            cause="c",
            steps=tuple(
                Step(action="a", version=1, target=f"t{n}", argv=("true",), read_only=read_only) for n in range(steps)
            ),
            autonomy="auto",
            made_at=self.now,
            expires_at=self.now + 900,
        )
        await self.store.record(PlanMade(at=self.now, plan=plan))
        await self.moved(id, "acting")
        return id

    async def verified(self, id: str) -> None:
        """Every step of its plan was carried out."""
        await self.went(id, StepState.INTENT, StepState.RAN, StepState.VERIFIED)

    async def went(self, id: str, *states: StepState) -> None:
        """Every step of its plan went this way."""
        path = [StepState.PLANNED, *states]
        plan = self.incident(id).plan
        assert plan is not None
        for n in range(len(plan.steps)):
            for before, after in itertools.pairwise(path):
                move = StepMoved(incident=id, plan=plan.id, step=n, before=before, after=after, at=self.now)
                await self.store.record(StepRecorded(move=move))

    def outcome(self, id: str, result: Any, *states: str) -> PlanOutcome:
        return PlanOutcome(plan=f"plan-{id}", result=result, states=tuple(map(StepState, states)), reason=str(result))

    def incident(self, id: str) -> Incident:
        found = self.store.state.incident(id)
        assert found is not None
        return found


async def open_world(directory: Path, **more: Any) -> World:
    store = Store.open(directory)
    policy = FoldPolicy()
    await store.record(AgentStarted(at=NOW, version="t", pid=1, sandbox="rlimits", autonomy="auto", policy=policy))
    return World(store, **more)
