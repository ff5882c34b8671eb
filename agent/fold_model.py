"""The shapes that the fold makes of the journal: incidents, their steps, approvals and story, and the table of moves.

`agent.incidents` (the fold) writes these; the API, the command line, the guard's wiring and incident tasks read them.
Nothing here reads a clock, a file or the network. An `Incident` changes only inside `agent.incidents.apply`; whoever
holds one over an `await` looks it up again, because a snapshot in progress makes the fold copy before it writes.

The life of an incident (`INCIDENT_MOVES`); every edge and who takes it:

    open -> investigating                 an incident task starts
    open -> escalated                     it cannot be looked at at all (reason says why)
    investigating -> diagnosed            ranked, or "insufficient evidence"
    investigating -> escalated            the investigation itself broke; a person gets it
    diagnosed -> suggested                a plan a person may carry out; nothing runs
    suggested -> awaiting_approval        a person made a request of the suggestion
    diagnosed -> awaiting_approval        a plan that waits for a person
    diagnosed -> acting                   a plan that was granted `auto`
    diagnosed -> declined                 no plan, and the reason (a `Refusal`)
    suggested -> escalated                nobody took the suggestion and the series stay bad
    awaiting_approval -> acting           approved
    awaiting_approval -> declined         rejected, expired, or refused when the gates were checked again
    acting -> declined                    every step was denied, expired or cancelled before its intent
    acting -> verifying                   the steps ran; now the series decide
    acting -> escalated                   failed, undone, handed over
    declined -> escalated                 nothing may be done: a person gets it
    verifying -> resolved                 the series that justified it are good again
    verifying -> escalated                still bad, and nothing left to try
    {diagnosed, suggested, awaiting_approval, declined, verifying} -> investigating
                                          new alerts or new evidence: another round (also when Alertmanager said
                                          "resolved" and the series are still bad); what waits for approval stays
                                          decidable meanwhile, and stays the plan where the look comes to the same
    {open, investigating, diagnosed, suggested, awaiting_approval, declined, acting} -> verifying
                                          Alertmanager said "resolved": a claim, which the series must confirm
    {resolved, escalated} -> open         reopened: only the fold does this, on a firing alert within the reopen window
"""

from __future__ import annotations

import hashlib
from base64 import b32encode
from enum import StrEnum
from typing import Literal, NamedTuple

import msgspec

from actions.model import IllegalMove, Plan, Refusal, StepMoved, StepState
from rules.feedback import Tally
from rules.model import Alert, AlertStatus, Diagnosis
from rules.recurrence import Precedent, Signature
from rules.verify import Justification
from sandbox.model import RunResult

MAX_ALERTS = 1_000  # kept per incident; what comes beyond is counted in `alerts_dropped`
MAX_ALERTS_CLOSED = 50
MAX_STORY = 300
MAX_STORY_CLOSED = 120
MAX_PAST = 20
MAX_MODELS = 50  # versions kept; the one that serves always is
CONFIRMED_TOLD = 10  # of so many looks that confirm a plan one is told
MAX_MOVES = 64  # of one step; a step has some ten, retries by a check more


class IncidentState(StrEnum):
    OPEN = "open"
    INVESTIGATING = "investigating"
    DIAGNOSED = "diagnosed"
    SUGGESTED = "suggested"
    AWAITING_APPROVAL = "awaiting_approval"
    ACTING = "acting"
    DECLINED = "declined"
    VERIFYING = "verifying"
    RESOLVED = "resolved"
    ESCALATED = "escalated"


_I = IncidentState
INCIDENT_MOVES: dict[IncidentState, frozenset[IncidentState]] = {
    _I.OPEN: frozenset({_I.INVESTIGATING, _I.VERIFYING, _I.ESCALATED}),
    _I.INVESTIGATING: frozenset({_I.DIAGNOSED, _I.VERIFYING, _I.ESCALATED}),
    _I.DIAGNOSED: frozenset(
        {_I.SUGGESTED, _I.AWAITING_APPROVAL, _I.ACTING, _I.DECLINED, _I.VERIFYING, _I.INVESTIGATING}
    ),
    _I.SUGGESTED: frozenset({_I.AWAITING_APPROVAL, _I.VERIFYING, _I.INVESTIGATING, _I.ESCALATED}),
    _I.AWAITING_APPROVAL: frozenset({_I.ACTING, _I.DECLINED, _I.VERIFYING, _I.INVESTIGATING}),
    _I.ACTING: frozenset({_I.VERIFYING, _I.DECLINED, _I.ESCALATED}),
    _I.DECLINED: frozenset({_I.ESCALATED, _I.VERIFYING, _I.INVESTIGATING}),
    _I.VERIFYING: frozenset({_I.RESOLVED, _I.ESCALATED, _I.INVESTIGATING}),
    _I.RESOLVED: frozenset({_I.OPEN}),
    _I.ESCALATED: frozenset({_I.OPEN}),
}
FINAL = frozenset({_I.RESOLVED, _I.ESCALATED})
UNSETTLED = frozenset({StepState.INTENT, StepState.UNDOING, StepState.UNKNOWN})  # an effect may be under way


def check_move(before: IncidentState, after: IncidentState) -> None:
    """Raises IllegalMove unless `before -> after` is in INCIDENT_MOVES."""
    if after not in INCIDENT_MOVES[before]:
        raise IllegalMove(f"incident: {before} -> {after} is not in the table")


PlanState = Literal[
    "",  # no plan
    "suggested",  # for a person to read; its steps never reach intent
    "waiting",  # for approval
    "granted",  # autonomy auto
    "approved",
    "rejected",
    "expired",
    "withdrawn",  # overtaken before anything ran (resolved, denied, another plan): an approval no longer counts
    "running",
    "done",  # every step verified
    "failed",
]
MAY_START: frozenset[PlanState] = frozenset({"granted", "approved", "running"})


class Given(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a person said the cause was."""

    at: float
    cause: str
    service: str
    helped: bool | None = None
    who: str
    origin: str
    note: str = ""


class ModelVersion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model made from feedback; `refused` says why it may not serve, "" if it may."""

    number: int
    at: float
    counts: Tally
    incidents: int
    golden: str
    refused: str = ""


class Models(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which model serves: 0 is the shipped one. `earlier` served before, newest last."""

    versions: tuple[ModelVersion, ...] = ()
    serving: int = 0
    pinned: bool = False
    earlier: tuple[int, ...] = ()
    last: int = 0  # newest number that was given

    def version(self, number: int) -> ModelVersion | None:
        return next((v for v in self.versions if v.number == number), None)


class StoryLine(msgspec.Struct, frozen=True, array_like=True, gc=False):
    at: float
    text: str
    kind: str  # the record's kind


class StepView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where one step of the current plan stands. `moves` is its whole journalled path, newest last."""

    state: StepState = StepState.PLANNED
    moves: tuple[StepMoved, ...] = ()
    result: RunResult | None = None  # newest
    leaf: str = ""  # newest cgroup leaf
    snapshot: str = ""  # newest fault snapshot
    intents: int = 0


class Approval(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A decision as it came. `counted` False: it changed nothing, and `why` says so."""

    at: float
    plan: str
    digest: str
    decision: Literal["approve", "reject"]
    who: str
    origin: str
    note: str = ""
    asked: str = ""
    token: str = ""
    counted: bool = False
    why: str = ""

    @property
    def person(self) -> str:
        return person_of(self.who, self.origin)


def person_of(who: str, origin: str) -> str:
    """Who somebody is when two different people are asked for. A name on the command line is a claim, the uid that the
    kernel tells is not; over HTTP the name is the credential's."""
    return origin if origin.startswith("cli ") else who


class Refused(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    at: float
    action: str = ""
    refusal: Refusal
    detail: str = ""


TRIED: frozenset[PlanState] = frozenset({"done", "failed"})


class PastPlan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An earlier round's plan: enough to see what was tried."""

    plan: str
    cause: str
    service: str
    actions: tuple[str, ...]
    states: tuple[StepState, ...]
    ended: PlanState
    made_at: float
    digest: str = ""  # where nothing of it had begun when another plan took its place,
    why: str = ""  # and why


class Incident(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One incident as the journal tells it. Times are unix seconds."""

    id: str
    tenant: str
    key: str  # what opened it: the group key, or alertname/service where a sender gives none
    state: IncidentState = IncidentState.OPEN
    opened_at: float
    opened_seq: int
    updated_at: float
    updated_seq: int
    closed_at: float | None = None
    moved_at: float = 0.0  # when it came into its state
    reason: str = ""  # of the last move
    refusal: Refusal | None = None  # of the last move
    keys: list[str] = []  # every group key that was merged in
    symptoms: list[tuple[str, str]] = []  # (alertname, service)
    services: list[str] = []  # that alerts named, in order of appearance
    entry: str = ""  # the service where the trouble was seen first, "" if no alert says
    alerts: dict[str, Alert] = {}  # by fingerprint, newest state of each
    alerts_dropped: int = 0
    truncated: int = 0  # alerts that Alertmanager said it left out
    last_alert_at: float
    last_firing_seq: int = 0  # newest record that brought a firing alert
    fresh: dict[str, int] = {}  # fingerprints that fired since the last look at the evidence began -> record
    receiver: str = ""
    external_url: str = ""
    traceparent: str = ""
    diagnosis: Diagnosis | None = None
    diagnosed_at: float = 0.0
    diagnosed_seq: int = 0
    evidence_at: float = 0.0
    evidence_seconds: float = 0.0
    diagnosis_seconds: float = 0.0
    justification: Justification | None = None  # of the best hypothesis, or of the symptom alone
    signature: Signature | None = None  # what the newest look looked like
    precedents: tuple[Precedent, ...] = ()  # earlier incidents that looked alike
    feedback: Given | None = None  # newest
    plan: Plan | None = None
    plan_digest: str = ""
    plan_state: PlanState = ""
    confirmed: int = 0  # looks that came to `plan` again
    steps: list[StepView] = []
    past: list[PastPlan] = []
    approvals: list[Approval] = []
    refusals: list[Refused] = []
    rounds: int = 0  # investigations begun since it was opened or reopened
    reopened: int = 0
    began_at: float = 0.0  # when it was opened or reopened; 0: written before this was kept
    story: list[StoryLine] = []
    story_dropped: int = 0

    @property
    def final(self) -> bool:
        return self.state in FINAL

    @property
    def firing(self) -> tuple[Alert, ...]:
        return tuple(a for a in self.alerts.values() if a.status == "firing")

    @property
    def onset(self) -> float:
        """Earliest startsAt of the firing alerts (of all alerts when none fires)."""
        return min((a.starts_at for a in self.firing or self.alerts.values()), default=self.opened_at)

    @property
    def has_news(self) -> bool:
        """A firing alert came after what the last diagnosis looked at."""
        return self.diagnosed_seq > 0 and self.last_firing_seq > self.diagnosed_seq

    @property
    def news(self) -> tuple[Alert, ...]:
        """What came after the last look at the evidence had begun, and still fires. Before any look nothing is news."""
        if not self.diagnosed_seq:
            return ()
        known = ((seq, self.alerts.get(fingerprint)) for fingerprint, seq in self.fresh.items())
        return tuple(a for seq, a in known if a is not None and a.status == "firing" and seq > self.diagnosed_seq)

    @property
    def only_looked(self) -> bool:
        """The plan is over, well or badly, and consisted of looks alone: what it saw is kept, nothing was changed."""
        return self.plan is not None and self.plan_state in TRIED and all(s.read_only for s in self.plan.steps)

    @property
    def carried_out(self) -> tuple[str, ...]:
        """Actions of the plans that were carried out, well or badly, since it was opened or reopened."""
        earlier = self.past[-(self.rounds - 1) :] if self.rounds > 1 else []  # a round makes at most one plan
        done = [action for past in earlier if past.ended in TRIED for action in past.actions]
        current = self.plan.steps if self.plan is not None and self.plan_state in TRIED else ()
        return (*done, *(step.action for step in current))

    @property
    def unsettled(self) -> tuple[int, ...]:
        """Indexes of steps whose effect may be under way (intent, undoing, unknown)."""
        return tuple(i for i, step in enumerate(self.steps) if step.state in UNSETTLED)

    def tell(self, at: float, text: str, kind: str) -> None:
        """Add a line to the story. Over the bound, how it began and how it stands are kept, the middle goes."""
        self.story.append(StoryLine(at, text, kind))
        if len(self.story) > MAX_STORY:
            del self.story[MAX_STORY // 3]
            self.story_dropped += 1

    @property
    def told_before(self) -> bool:
        """A look that finds the plan as it is says nothing new: one of `CONFIRMED_TOLD` is told."""
        stands = self.plan_state in ("waiting", "approved", "suggested", "withdrawn")
        return stands and self.confirmed % CONFIRMED_TOLD != 0

    def why_not_confirmed(self, at: float) -> str:
        """Why a look at `at` that comes to the same plan cannot leave it in its place, "" if it can. What was approved
        and then withdrawn never comes back: that approval must not count any more."""
        plan = self.plan
        if plan is None:
            return "there is no plan"
        if not at < plan.expires_at:
            return "it has expired"
        if self.plan_state in ("waiting", "suggested", "approved", "rejected"):
            return ""
        begun = any(step.moves for step in self.steps)
        decided = any(a.counted and a.plan == plan.id for a in self.approvals)
        if self.plan_state != "withdrawn" or plan.autonomy != "approve" or begun:
            return f"it is {self.plan_state}"
        return "it was decided on, and then withdrawn" if decided else ""

    def archive_plan(self, why: str = "") -> None:
        """The current plan becomes one of the past ones. `why` another one takes its place, where nothing had begun."""
        plan = self.plan
        if plan is None:
            return
        self.past.append(
            PastPlan(
                plan=plan.id,
                cause=plan.cause,
                service=plan.service,
                actions=tuple(s.action for s in plan.steps),
                states=tuple(s.state for s in self.steps),
                ended=self.plan_state,
                made_at=plan.made_at,
                digest=self.plan_digest if why else "",
                why=why,
            )
        )
        del self.past[:-MAX_PAST]
        self.plan, self.plan_digest, self.plan_state, self.steps, self.confirmed = None, "", "", [], 0

    def copy(self) -> Incident:
        """With containers of its own; what they hold is frozen and shared."""
        twin = msgspec.structs.replace(self)
        for name in (
            "keys",
            "symptoms",
            "services",
            "alerts",
            "fresh",
            "steps",
            "past",
            "approvals",
            "refusals",
            "story",
        ):
            setattr(twin, name, getattr(self, name).copy())
        return twin


class Current(msgspec.Struct, frozen=True, gc=False):
    """The newest recorded state of (tenant, fingerprint): what makes a re-send a duplicate."""

    digest: str
    status: AlertStatus
    at: float
    incident: str  # "" when it belongs to none


class ActionStart(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An intent that was journalled: what cooldowns and rate limits count."""

    at: float
    action: str
    target: str
    service: str
    incident: str
    tenant: str

    @property
    def active(self) -> bool:
        """As the gates ask: what is under way is told apart from what once began (`GuardContext.claims`, `begun`)."""
        return False


class Changes(NamedTuple):
    """What one record did: ids of the incidents it touched, and of those it opened, reopened or closed."""

    incidents: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()
    reopened: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()


def incident_id(tenant: str, key: str, seq: int) -> str:
    """`inc-` and 60 bits of BLAKE2b over (tenant, key, sequence number of the opening record)."""
    body = msgspec.json.encode((tenant, key, seq))
    return "inc-" + b32encode(hashlib.blake2b(body, digest_size=8).digest())[:12].decode().lower()
