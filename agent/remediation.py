"""From the best hypothesis to a plan, and from a plan to its outcome: what `actions` needs of the world, handed to it.

Called by `agent.investigate`. Exists because `actions` knows no journal and no incident: here the folded state becomes
the guard's context, the store becomes the runner's ledger, and the sandbox gets its environment. It decides nothing:
the gates are in `actions.guard`, the moves in `actions.runner`.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import msgspec

import sandbox
from actions import guard
from actions.catalog import Catalog
from actions.guard import Claim, GuardContext
from actions.model import BreakerMoved, Declined, Plan, Refusal, StepMoved
from actions.policy import HOUR
from actions.runner import PlanOutcome, Runner, RunnerSettings
from agent.config import Config
from agent.fold_model import Incident, IncidentState
from agent.fold_state import State
from agent.journal.records import BreakerRecorded, StepRecorded
from agent.remote import Executors
from agent.snapshot import FaultSnapshots
from agent.store import Store
from agent.telemetry import Telemetry
from agent.verify import SeriesVerifier
from rules.model import Topology
from sandbox.model import Limits, Needs, RunResult

SNAPSHOT_WINDOW_SECONDS = 900.0
SNAPSHOT_SERIES = 20
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Ledger:
    """The runner's ledger: a move is recorded when `store.record` returns, which is when it is durable."""

    def __init__(self, store: Store, telemetry: Telemetry) -> None:
        self._store = store
        self._telemetry = telemetry

    async def record_step(self, move: StepMoved) -> None:
        await self._store.record(StepRecorded(move=move))
        if move.result is not None:
            self._telemetry.sandbox_run(move.result)
            self._telemetry.observe("step_run", move.result.seconds)

    async def record_breaker(self, move: BreakerMoved) -> None:
        await self._store.record(BreakerRecorded(move=move))


class Remediation:
    """`consider` makes a plan or says why not, `recheck` asks again what time may change, `run` carries it out."""

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        store: Store,
        verifier: SeriesVerifier,
        telemetry: Telemetry,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._store, self._telemetry = config, store, telemetry
        self._clock = clock
        self._environment_secrets: dict[str, str] = {}
        self.use(catalog)
        self._verifier = verifier
        self._policy, self._inventory = config.guard_policy, config.inventory_with()
        self._claimed: dict[str, Claim] = {}  # by plan
        self._graph, self._needing = Topology(), dict[str, frozenset[str]]()
        self._let: dict[str, Plan] = {}  # plans that were let begin and whose task has not ended, by incident
        self.snapshots = FaultSnapshots(
            config.state_dir / "snapshots",
            self._inventory,
            clock,
            logs={service: entry.logs for service, entry in config.inventory.items()},
            evidence=self._series,
            keep_seconds=config.journal.keep_days * 86400.0,
        )
        settings = RunnerSettings(
            protection=config.sandbox.protection,
            user=config.sandbox.user,
            breaker=config.breaker,
            secrets=self._environment_secrets,
            environment=self._plan_environment,
            permit=self._permit,
            snapshot=self.snapshots.take,
            at_once=config.guard.max_steps_at_once,
        )
        ledger = Ledger(store, telemetry)
        self.executors = Executors(config.hosts)
        self.runner = Runner(ledger, self.executors, verifier, clock, settings, store.state.breakers.values())

    def use(self, catalog: Catalog) -> None:
        """The actions that there are: at the start, before anything is considered."""
        self._catalog = catalog
        self._descriptors = {s.name for d in catalog for s in d.environment if s.by == "descriptor"}
        self._environment_secrets.update(self._secrets())

    async def consider(self, incident: Incident) -> Plan | Declined:
        """The plan for the best hypothesis: its proposals are tried in order, the first that can be planned counts.
        Without one, the refusal of the last. What has been looked at is not looked at again: a look comes before a
        remedy that would destroy what it sees, and does not take its place."""
        diagnosis = incident.diagnosis
        best = diagnosis.best if diagnosis else None
        if best is None:
            return Declined(reason=Refusal.NO_PROPOSAL, detail="no hypothesis stands clear")
        refused = Declined(
            reason=Refusal.NO_PROPOSAL, detail=f"{best.title}: no safe remedy is known, a person has to look at it"
        )
        kept = ""
        for proposal in best.proposals:
            if proposal.action in incident.carried_out and self._looks(proposal.action):
                kept = f"{best.title}: what {proposal.action} captured is kept, a person has to look at it"
                refused = Declined(reason=Refusal.NO_PROPOSAL, detail=kept)
                continue
            await self.executors.learn_enforcement(self._host(proposal.service))
            context = self.context(incident, proposal.service)
            reader = self._reader(incident)
            plan = await guard.consider(proposal, self._catalog, context, reader, partial(self._reader, incident))
            if isinstance(plan, Plan):
                return plan
            refused = plan
        if kept and refused.detail != kept:
            return msgspec.structs.replace(refused, detail="; ".join(filter(None, (kept, refused.detail))))
        return refused

    def _looks(self, action: str) -> bool:
        definition = self._catalog.get(action)
        return definition is not None and definition.read_only

    def differs(self, waiting: Plan, fresh: Plan) -> str:
        """What is different in a newer look's plan, "" where it is the waiting one."""
        return guard.differs(waiting, fresh, self._catalog.get(fresh.steps[0].action) if fresh.steps else None)

    def recheck(self, incident: Incident) -> Declined | None:
        """The gates that time may have closed since the plan was made."""
        plan = incident.plan
        if plan is None or not plan.steps:
            return Declined(reason=Refusal.NO_PROPOSAL, detail="there is no plan")
        return guard.recheck(plan, self._catalog.get(plan.steps[0].action), self.context(incident, plan.service))

    async def run(self, incident: Incident, cancelled: asyncio.Event) -> PlanOutcome:
        """Runs the incident's plan; after a crash goes on from the journalled moves, never repeating blindly."""
        plan = incident.plan
        if plan is None:
            raise ValueError(f"remediation: incident {incident.id} has no plan")
        moves = [move for step in incident.steps for move in step.moves]
        try:
            if moves:
                return await self.runner.recover(plan, moves, cancelled)
            return await self.runner.run(plan, cancelled)
        finally:
            self._let.pop(incident.id, None)

    def _host(self, service: str) -> str:
        """Where the service runs, if that is a configured host; "" for this one."""
        entry = self._config.inventory.get(service)
        return entry.host if entry is not None and entry.host in self._config.hosts else ""

    def _entries(self, service: str) -> Mapping[str, Mapping[str, str]]:
        """The inventory, with an entry for a Kubernetes object that nobody has to list."""
        if service in self._inventory or not service:
            return self._inventory
        return self._config.inventory_with((service,))

    def context(self, incident: Incident, service: str = "") -> GuardContext:
        """The world as the gates see it, now, for an action on `service`. Asked for before every step, so that it must
        cost little however many incidents there are: what nobody may look at is made when it is looked at."""
        state, diagnosis = self._store.state, incident.diagnosis
        best = diagnosis.best if diagnosis else None
        now, host = self._clock(), self._host(service)
        horizon = max(HOUR, self._policy.cooldown_seconds)
        return GuardContext(
            now=now,
            incident=incident.id,
            cause=best.cause if best else "",
            posterior=best.posterior if best else 0.0,
            margin=diagnosis.margin if diagnosis else 0.0,
            firing=bool(incident.firing),
            evidence_at=incident.evidence_at,
            verifiable=incident.justification is not None and bool(incident.justification.series),
            verify_at_least=self._config.recovery_seconds,
            policy=self._policy,
            inventory=self._entries(service),
            enforced_by=self.executors.enforced_by(host) if host else sandbox.current().enforced_by,
            remote_hosts=self.executors.names,
            alerts=tuple(sorted({alert.name for alert in incident.firing})),
            tenant=incident.tenant,
            environment=self._config.environment,
            paused=state.is_paused,
            opened=self._opened(),
            history=state.action_starts(since=now - horizon),
            begun=incident.plan.made_at if incident.plan is not None and incident.plan_state == "running" else None,
            claims=self._claims(incident.id),
            callers=self._callers(),
            degraded=_Degraded(state, incident.id),
            breakers=self.runner.breakers,
            secrets=self._environment_secrets,
        )

    def _opened(self) -> tuple[float, ...]:
        """When incidents opened, in order: as many of the newest as can still make a storm."""
        storm = self._policy.storm
        many = (storm.incidents + 1) * (3 + math.ceil(storm.cooldown_seconds / storm.window_seconds))
        newest = itertools.islice(reversed(self._store.state.incidents.values()), many)
        return tuple(i.opened_at for i in newest)[::-1]

    def _permit(self, plan: Plan, step: int) -> Declined | None:
        """Asked by the runner before each step: the gates at the moment of acting."""
        incident = self._store.state.incident(plan.incident)
        if incident is None or incident.plan is None or incident.plan.id != plan.id:
            return Declined(reason=Refusal.APPROVAL_STALE, detail="the incident has another plan by now")
        refused = self.recheck(incident)
        if refused is None:
            # From here on others see it, although its intent is not durable yet: two plans that ask at the same moment
            # must not both be told that nobody acts.
            self._let[incident.id] = plan
        return refused

    def _claims(self, mine: str) -> tuple[Claim, ...]:
        """What other incidents' plans act on: those under way by the journal, and those that were just let begin."""
        plans = self._store.state.plans_under_way()
        plans.update(self._let)
        plans.pop(mine, None)
        # Each plan's claim is made once; a plan that is over leaves.
        self._claimed = {plan.id: self._claimed.get(plan.id) or _claim(id, plan) for id, plan in plans.items()}
        return tuple(self._claimed.values())

    def _callers(self) -> Mapping[str, frozenset[str]]:
        topology = self._verifier.situations.topology_known
        if self._graph is not topology:
            self._graph, self._needing = topology, _callers(topology.edges)
        return self._needing

    async def _series(self, plan: Plan) -> dict[str, Any]:
        """The series that justify the plan, as they are now, for the snapshot before its step."""
        incident = self._store.state.incident(plan.incident)
        justification = incident.justification if incident is not None else None
        if incident is None or justification is None or not justification.series:
            return {"missing": "no series justify the plan"}
        names = {watched.metric for watched in justification.series}
        seen = await self._verifier.situations.since(incident, names, self._clock() - SNAPSHOT_WINDOW_SECONDS)
        wanted = {(watched.metric, watched.labels) for watched in justification.series}
        rows: dict[str, list[tuple[float, float | None]]] = {}
        for evidence in seen.evidence:
            for i, series in enumerate(evidence.frame.ids):
                if (series.metric, series.labels) in wanted and len(rows) < SNAPSHOT_SERIES:
                    pairs = zip(evidence.frame.times, evidence.frame.values[i], strict=True)
                    rows[str(series)] = [(float(t), None if math.isnan(v) else float(v)) for t, v in pairs]
        return {"series": rows, "missing": {e.name: e.missing for e in seen.evidence if e.missing is not None}}

    def _secrets(self) -> dict[str, str]:
        """The variables of our own environment that an action of the catalogue names."""
        names = {secret.name for definition in self._catalog for secret in definition.environment}
        return {name: os.environ[name] for name in names if name in os.environ}

    def _reader(self, incident: Incident, host: str = "") -> guard.SandboxRun:
        """Runs the read-only look-ups of a plan in the making."""

        async def read(argv: tuple[str, ...], limits: Limits, secrets: Mapping[str, str], needs: Needs) -> RunResult:
            by_descriptor = {name: value for name, value in secrets.items() if name in self._descriptors}
            by_name = {name: value for name, value in secrets.items() if name not in self._descriptors}
            return await self.executors.run(
                argv,
                limits,
                env={**self._environment(incident), **by_name},
                user=self._config.sandbox.user,
                protection=self._config.sandbox.protection,
                secrets=by_descriptor,
                redact=tuple(by_name.values()),
                needs=needs,
                host=host,
            )

        return read

    def _plan_environment(self, plan: Plan) -> Mapping[str, str]:
        incident = self._store.state.incident(plan.incident)
        return self._environment(incident) if incident is not None else {"PATH": PATH}

    def _environment(self, incident: Incident) -> dict[str, str]:
        """What a sandboxed process gets besides its secrets: a fixed path, and the trace to continue."""
        environment = {"PATH": PATH, "LANG": "C.UTF-8"}
        tracing = self._telemetry.tracing
        if tracing is not None:
            environment["TRACEPARENT"] = tracing.traceparent_for(incident.id, incident.traceparent)
        return environment


def _callers(edges: Iterable[tuple[str, str]]) -> dict[str, frozenset[str]]:
    """Service -> those that call or depend on it."""
    found: dict[str, set[str]] = {}
    for caller, callee in edges:
        found.setdefault(callee, set()).add(caller)
    return {callee: frozenset(callers) for callee, callers in found.items()}


def _claim(incident: str, plan: Plan) -> Claim:
    resources = frozenset[str]().union(*(guard.resources_of(s.target, s.params) for s in plan.steps))
    return Claim(incident, plan.service, resources)


class _Degraded(Mapping[str, frozenset[str]]):
    """Services in trouble by other incidents that are not over -> the services that were found to be its cause."""

    def __init__(self, state: State, mine: str) -> None:
        self._state, self._mine = state, mine

    @functools.cached_property
    def _found(self) -> dict[str, frozenset[str]]:
        found: dict[str, set[str]] = {}
        for incident in self._state.incidents.values():
            over = incident.state is IncidentState.RESOLVED or not incident.firing
            if incident.id == self._mine or over:
                continue
            best = incident.diagnosis.best if incident.diagnosis else None
            for service in incident.services:
                found.setdefault(service, set()).update({best.service} if best else ())
        return {service: frozenset(causes) for service, causes in found.items()}

    def __getitem__(self, service: str) -> frozenset[str]:
        return self._found[service]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)
