"""`State`: all that the service knows, folded from the journal, with the questions others ask of it.

Made by `agent.incidents.apply` (one record after the other, on the event loop), read by everybody else. No clock: "now"
is the newest time that any record carried, so that the same records make the same state anywhere. It is bounded:
closed incidents, alert states, action starts, quarantine and log are forgotten by the journalled `FoldPolicy` or by the
constants here. Never does I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import msgspec

from actions.breaker import MAX_BREAKERS
from actions.model import BreakerMoved, Plan
from agent.fold_changes import ChangeTold
from agent.fold_gateway import GatewayState
from agent.fold_model import (
    MAX_ALERTS_CLOSED,
    MAX_STORY_CLOSED,
    ActionStart,
    Current,
    Incident,
    IncidentState,
    Models,
    StepView,
    StoryLine,
)
from agent.journal.records import AgentStarted, AlertQuarantined, FoldPolicy, PauseSet
from rules.feedback import Observation

SNAPSHOT_VERSION = 1
ACTION_SECONDS = 7 * 86400.0
MAX_ACTIONS = 10_000
MAX_QUARANTINE = 200
MAX_LOG = 300
MAX_OBSERVATIONS = 2_000

IndexKey = tuple[str, str, str]  # (group | symptom | service, tenant, value)


class StateError(ValueError):
    """A snapshot that this version cannot read."""


@dataclass(frozen=True, slots=True)
class UnsettledStep:
    """A step whose effect may have happened: recovery runs its check, never the step."""

    incident: Incident
    index: int
    step: StepView


class _Body(msgspec.Struct, kw_only=True):
    """A snapshot's JSON. Order matters: forgetting goes from the oldest."""

    version: int
    seq: int
    now: float
    policy: FoldPolicy
    incidents: list[msgspec.Raw]
    live: list[str]
    closed: list[str]
    index: list[tuple[str, str, str, str]]
    digests: list[tuple[str, str, str, str, float, str]]
    breakers: list[BreakerMoved]
    actions: list[ActionStart]
    quarantined: list[AlertQuarantined]
    quarantined_count: int
    log: list[StoryLine]
    paused: PauseSet | None
    started: AgentStarted | None
    observations: list[Observation] = []
    models: Models = Models()
    gateway: GatewayState = msgspec.field(default_factory=GatewayState)
    changes: list[ChangeTold] = []


class State:
    """Everything, after the record `seq`. Change it through `agent.incidents.apply` only."""

    def __init__(self) -> None:
        self.seq = 0
        self.now = 0.0  # newest time of any record
        self.policy = FoldPolicy()
        self.incidents: dict[str, Incident] = {}  # by id, in order of opening
        self.live: dict[str, None] = {}  # ids that are not final, in order of (re)opening
        self.closed: dict[str, None] = {}  # ids that are final, in order of closing
        self.index: dict[IndexKey, str] = {}  # what a new alert may join: newest incident per key
        self.digests: dict[tuple[str, str], Current] = {}  # (tenant, fingerprint), least recently changed first
        self.breakers: dict[str, BreakerMoved] = {}  # newest move per key
        self.actions: list[ActionStart] = []  # oldest first
        self.quarantined: list[AlertQuarantined] = []  # newest last
        self.quarantined_count = 0
        self.log: list[StoryLine] = []  # what belongs to no incident
        self.paused: PauseSet | None = None
        self.started: AgentStarted | None = None
        self.observations: list[Observation] = []  # what people said, oldest first; one an incident
        self.models = Models()
        self.gateway = GatewayState()
        self.changes: list[ChangeTold] = []  # what was said to have been changed, in order of telling
        self._frozen: set[str] = set()  # ids whose Incident a snapshot in progress still reads

    # -- questions

    def incident(self, id: str) -> Incident | None:
        return self.incidents.get(id)

    def active(self) -> list[Incident]:
        """Not final, oldest (re)opening first."""
        return [self.incidents[id] for id in self.live]

    def waiting(self, tenant: str) -> list[Incident]:
        """The tenant's incidents in state open, oldest (re)opening first."""
        return [i for i in self.active() if i.state is IncidentState.OPEN and i.tenant == tenant]

    def waiting_tenants(self) -> dict[str, int]:
        """Tenant -> how many of its incidents are in state open."""
        counts: dict[str, int] = {}
        for incident in self.active():
            if incident.state is IncidentState.OPEN:
                counts[incident.tenant] = counts.get(incident.tenant, 0) + 1
        return counts

    @property
    def is_paused(self) -> bool:
        return self.paused is not None and self.paused.paused

    def current(self, tenant: str, fingerprint: str) -> Current | None:
        return self.digests.get((tenant, fingerprint))

    def current_digest(self, tenant: str, fingerprint: str) -> str | None:
        """Digest of the alert's newest recorded state; an arriving alert with the same one is a duplicate."""
        known = self.digests.get((tenant, fingerprint))
        return known.digest if known is not None else None

    def unsettled_steps(self) -> list[UnsettledStep]:
        """Steps in intent, undoing or unknown: after a restart nobody knows what became of them."""
        return [UnsettledStep(i, n, i.steps[n]) for i in self.active() for n in i.unsettled]

    def plans_under_way(self) -> dict[str, Plan]:
        """Incident -> its plan, where a step has begun and not all have ended: what it names is being acted on."""
        running = (self.incidents[id] for id in self.live)
        return {i.id: i.plan for i in running if i.plan_state == "running" and i.plan is not None}

    def action_starts(self, action: str = "", target: str = "", since: float = 0.0) -> list[ActionStart]:
        """Journalled intents at or after `since`, oldest first; "" means any."""
        return [
            a
            for a in self.actions
            if a.at >= since and (not action or a.action == action) and (not target or a.target == target)
        ]

    def quiet_windows(
        self, service: str, start: float, end: float, without: str = ""
    ) -> tuple[tuple[float, float], ...]:
        """When within [start, end] an incident (other than `without`) that named `service` was open, or its alerts
        still fired, in time order. Such times are no baseline."""
        found = []
        for incident in self.incidents.values():
            if incident.id == without or (service and service not in incident.services):
                continue
            begin = min(incident.onset, incident.opened_at)
            until = incident.closed_at if incident.closed_at is not None else end
            if incident.state is IncidentState.ESCALATED:
                # It was closed long before its trouble was over: the alerts tell when that was.
                ended = [alert.ends_at or alert.starts_at for alert in incident.alerts.values()]
                until = end if incident.firing else max(until, *ended)
            if begin < end and until > start:
                found.append((max(begin, start), min(until, end)))
        return tuple(sorted(found))

    # -- for the fold

    def writable(self, id: str) -> Incident:
        """The incident, its own copy if a snapshot is being made of the old one. KeyError if unknown."""
        incident = self.incidents[id]
        if id in self._frozen:
            self._frozen.discard(id)
            incident = self.incidents[id] = incident.copy()
        return incident

    def touch(self, id: str, at: float, seq: int) -> Incident:
        """The incident, writable, marked as changed by record `seq`. KeyError if unknown."""
        self.now = max(self.now, at)
        incident = self.writable(id)
        incident.updated_at = max(incident.updated_at, at)
        incident.updated_seq = seq
        return incident

    def tell(self, at: float, text: str, kind: str) -> None:
        """A line for the log of what belongs to no incident."""
        self.now = max(self.now, at)
        self.log.append(StoryLine(at, text, kind))
        del self.log[:-MAX_LOG]

    def close(self, incident: Incident) -> None:
        """Move to the closed ones and cut down to what a reader wants later."""
        self.live.pop(incident.id, None)
        self.closed[incident.id] = None
        extra = len(incident.alerts) - MAX_ALERTS_CLOSED
        if extra > 0:
            incident.alerts = dict(islice(incident.alerts.items(), MAX_ALERTS_CLOSED))
            incident.alerts_dropped += extra
        extra = len(incident.story) - MAX_STORY_CLOSED
        if extra > 0:
            half = MAX_STORY_CLOSED // 2
            incident.story = incident.story[:half] + incident.story[-half:]
            incident.story_dropped += extra
        while len(self.closed) > self.policy.closed:
            self._forget_incident(next(iter(self.closed)))

    def reopen(self, incident: Incident) -> None:
        """Open again, from the start: the last round's plan is history, its diagnosis stays until the next one."""
        incident.state, incident.closed_at = IncidentState.OPEN, None
        incident.reason, incident.refusal = "", None
        incident.reopened += 1
        incident.began_at = self.now
        incident.rounds = 0
        incident.archive_plan()
        self.closed.pop(incident.id, None)
        self.live[incident.id] = None

    def forget(self) -> None:
        """Drop what is past its time. Called by the fold at fixed sequence numbers, so that replay forgets alike."""
        policy = self.policy
        while self.closed:
            id = next(iter(self.closed))
            if (self.incidents[id].closed_at or 0.0) >= self.now - policy.closed_seconds:
                break
            self._forget_incident(id)
        self._forget_digests()
        old = self.now - ACTION_SECONDS
        drop = next((n for n, a in enumerate(self.actions) if a.at >= old), len(self.actions))
        drop = max(drop, len(self.actions) - MAX_ACTIONS)
        if drop:
            del self.actions[:drop]
        while len(self.breakers) > MAX_BREAKERS:
            del self.breakers[next(iter(self.breakers))]

    def _forget_digests(self) -> None:
        # Looked up from the front once: what was deleted there is scanned again by every new iteration.
        digests, policy = self.digests, self.policy
        old = self.now - policy.digest_seconds
        for key in list(islice(digests, 1024)):
            known = digests[key]
            if known.at >= old:
                break
            del digests[key]
            if known.status == "firing" and known.incident in self.live:
                digests[key] = known  # still wanted: its resolve finds the incident through it
        for key in list(islice(digests, max(0, len(digests) - policy.digests))):
            del digests[key]

    def _forget_incident(self, id: str) -> None:
        incident = self.incidents.pop(id)
        del self.closed[id]
        self._frozen.discard(id)
        for key in index_keys(incident):
            if self.index.get(key) == id:
                del self.index[key]

    # -- snapshots

    def freeze(self) -> FrozenState:
        """A view that stays as it is while the state goes on; encode it off the loop. One at a time."""
        frozen = FrozenState(self)
        self._frozen = set(self.incidents)
        return frozen

    def trial(self, ids: Iterable[str]) -> State:
        """A throw-away state with copies of these incidents alone, to try records on before they are written."""
        twin = State()
        twin.seq, twin.now, twin.policy = self.seq, self.now, self.policy
        twin.models = self.models
        for id in ids:
            known = self.incidents.get(id)
            if known is not None:
                twin.incidents[id] = known.copy()
                (twin.closed if known.final else twin.live)[id] = None
        return twin

    def thaw(self) -> None:
        """The frozen view is no longer read."""
        self._frozen = set()

    def to_snapshot(self) -> bytes:
        return FrozenState(self).encode()

    @classmethod
    def from_snapshot(cls, body: bytes) -> State:
        """Raises StateError on a body of another version or shape."""
        try:
            raw = msgspec.json.decode(body, type=_Body)
            incidents = [_decode_incident(item) for item in raw.incidents]
        except msgspec.MsgspecError as error:
            raise StateError(
                f"snapshot: cannot read the state: {error}; hint: it was written by another version of alertmedic"
            ) from error
        if raw.version != SNAPSHOT_VERSION:
            raise StateError(f"snapshot: version {raw.version}, this alertmedic reads {SNAPSHOT_VERSION}")
        state = cls()
        state.seq, state.now, state.policy = raw.seq, raw.now, raw.policy
        state.closed = dict.fromkeys(raw.closed)
        state.incidents = {i.id: i for i in incidents}
        state.live = dict.fromkeys(raw.live)
        state.index = {(kind, tenant, value): id for kind, tenant, value, id in raw.index}
        state.digests = {
            (t, f): Current(digest=d, status="firing" if s == "firing" else "resolved", at=at, incident=i)
            for t, f, d, s, at, i in raw.digests
        }
        state.breakers = {b.key: b for b in raw.breakers}
        state.actions, state.log = raw.actions, raw.log
        state.quarantined, state.quarantined_count = raw.quarantined, raw.quarantined_count
        state.paused, state.started = raw.paused, raw.started
        state.observations, state.models = raw.observations, raw.models
        state.gateway, state.changes = raw.gateway, raw.changes
        return state


class FrozenState:
    """One moment of a State. `encode` may run in another thread while the fold goes on."""

    def __init__(self, state: State) -> None:
        self.seq = state.seq
        self._now = state.now
        self._policy = state.policy
        self._incidents = list(state.incidents.values())
        self._live = list(state.live)
        self._closed = list(state.closed)
        self._index = dict(state.index)
        self._digests = dict(state.digests)
        self._breakers = list(state.breakers.values())
        self._actions = list(state.actions)
        self._quarantined = list(state.quarantined)
        self._quarantined_count = state.quarantined_count
        self._log = list(state.log)
        self._paused = state.paused
        self._started = state.started
        self._observations = list(state.observations)
        self._models = state.models
        self._gateway = state.gateway.copy()
        self._changes = list(state.changes)

    def encode(self) -> bytes:
        """The snapshot's body (JSON). Incident by incident, so that no single call holds the interpreter for long."""
        encode = msgspec.json.Encoder().encode
        return encode(
            _Body(
                version=SNAPSHOT_VERSION,
                seq=self.seq,
                now=self._now,
                policy=self._policy,
                incidents=[msgspec.Raw(encode(i)) for i in self._incidents],
                live=self._live,
                closed=self._closed,
                index=[(*key, id) for key, id in self._index.items()],
                digests=[(*key, c.digest, c.status, c.at, c.incident) for key, c in self._digests.items()],
                breakers=self._breakers,
                actions=self._actions,
                quarantined=self._quarantined,
                quarantined_count=self._quarantined_count,
                log=self._log,
                paused=self._paused,
                started=self._started,
                observations=self._observations,
                models=self._models,
                gateway=self._gateway,
                changes=self._changes,
            )
        )


def index_keys(incident: Incident) -> Iterator[IndexKey]:
    """Every key under which the incident may stand in `State.index`."""
    tenant = incident.tenant
    for key in incident.keys:
        yield ("group", tenant, key)
    for name, service in incident.symptoms:
        yield ("symptom", tenant, symptom_value(name, service))
    for service in incident.services:
        yield ("service", tenant, service)


def symptom_value(name: str, service: str) -> str:
    return f"{name}\x00{service}"


_decode_incident = msgspec.json.Decoder(Incident).decode
