"""The kinds of journal records. A record is one fact that happened; an incident is what the fold makes of them.

Written by `agent` only. Each kind has a name and a version on disk; a reader meets an unknown kind or version with an
error, never by skipping. Adding an optional field keeps the version; anything else makes a new one.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from actions.model import BreakerMoved, Plan, Refusal, StepMoved
from agent.fold_changes import ChangeTold
from agent.fold_gateway import ChannelMoved, GatewayCompared, GatewayJudged
from rules.feedback import Tally
from rules.model import Alert, Diagnosis
from rules.recurrence import Precedent, Signature
from rules.verify import Justification


class FoldPolicy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the fold merges and forgets. Travels in `AgentStarted`, because a fold that depended on today's configuration
    would make other incidents out of yesterday's records. Durations in seconds."""

    merge_seconds: float = 300.0  # since the incident's last alert
    reopen_seconds: float = 900.0  # since the incident was closed
    service_label: str = "service"
    neighbours: tuple[tuple[str, str], ...] = ()  # services whose alerts belong together (topology edges, either way)
    digest_seconds: float = 7 * 86400.0  # how long an alert's current state is remembered after its last change
    digests: int = 100_000  # at most; the oldest are forgotten first
    closed_seconds: float = 30 * 86400.0  # how long closed incidents stay
    closed: int = 2_000  # at most


class AlertsReceived(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="alerts_received"):
    """The new alerts of one webhook (re-sends are not recorded). One record a request, so it is all or nothing."""

    at: float
    tenant: str
    receiver: str
    group_key: str
    group_labels: dict[str, str] = {}
    external_url: str = ""
    alerts: tuple[Alert, ...]
    truncated: int = 0
    traceparent: str = ""
    source: Literal["webhook", "reconcile"] = "webhook"


class PayloadReceived(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="payload_received"):
    """The same of a webhook whose body is just as Alertmanager writes it: the body as it came (`agent.alerts` reads it;
    it was checked before), with the indexes of those of its alerts that were known already."""

    at: float
    tenant: str
    traceparent: str = ""
    known: tuple[int, ...] = ()
    body: msgspec.Raw


class AlertQuarantined(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="alert_quarantined"):
    """A body, or one alert of it, that could not be understood. `head` is bounded; `digest` is of the whole."""

    at: float
    tenant: str
    digest: str
    path: str
    reason: str
    index: int | None = None  # None: the whole body
    head: str = ""


class IncidentMoved(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="incident_moved"):
    at: float
    incident: str
    before: str
    after: str
    reason: str = ""
    refusal: Refusal | None = None  # with after = declined, suggested or escalated
    seen: int = 0  # newest sequence number applied when this was written (the store fills it in); 0: not told
    keeps_plan: bool = False  # with after = investigating: what waits may be decided on while it is looked at again


class Diagnosed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="diagnosed"):
    at: float
    incident: str
    diagnosis: Diagnosis
    evidence_seconds: float = 0.0
    diagnosis_seconds: float = 0.0
    evidence_at: float = 0.0  # end of the window that was looked at
    justification: Justification | None = None  # what spoke for the best hypothesis: recovery is judged by it
    seen: int = 0  # newest sequence number applied when the look at the evidence began; 0: not told
    signature: Signature | None = None  # what it looked like: what feedback and later incidents are compared with
    precedents: tuple[Precedent, ...] = ()


class PlanMade(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="plan_made"):
    """`replaces`: the plan of an earlier look, of which nothing had begun, and `why` it is not that one."""

    at: float
    plan: Plan
    replaces: str = ""
    why: str = ""


class PlanConfirmed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="plan_confirmed"):
    """A newer look came to the incident's plan again: that stays as it is, with its id, its decisions and its end. One
    that "resolved" had withdrawn waits again."""

    at: float
    incident: str
    plan: str


class PlanDeclined(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="plan_declined"):
    at: float
    incident: str
    action: str = ""
    refusal: Refusal
    detail: str = ""


class ApprovalGiven(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="approval_given"):
    """A person's decision. It counts only if `digest` is that of the waiting plan and `at < plan.expires_at`. `asked`:
    the digest that the person sent, where it was of a suggestion. `token`: the number of the signed link it came by."""

    at: float
    incident: str
    plan: str
    digest: str
    decision: Literal["approve", "reject"]
    who: str
    origin: str  # "cli uid=0", "http 10.0.0.4"
    note: str = ""
    asked: str = ""
    token: str = ""


class StepRecorded(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="step_recorded"):
    move: StepMoved


class BreakerRecorded(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="breaker_recorded"):
    move: BreakerMoved


class Noted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="noted"):
    """A sentence for an incident's story that moves nothing ("Prometheus did not answer: connection refused")."""

    at: float
    incident: str
    text: str


class AgentStarted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="agent_started"):
    at: float
    version: str
    pid: int
    sandbox: str
    autonomy: str
    policy: FoldPolicy | None = None  # from here on; None: as before


class PauseSet(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="pause_set"):
    at: float
    paused: bool
    who: str
    note: str = ""


class FeedbackGiven(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="feedback_given"):
    """What a person says an incident's cause was, and whether what was done helped. The newest one counts."""

    at: float
    incident: str
    cause: str
    service: str
    helped: bool | None = None  # None: not told
    who: str
    origin: str
    note: str = ""


class ModelMade(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="model_made"):
    """A model that takes `counts` into account was held against the golden incidents. It serves from here on, unless
    `refused` says why not, or a person chose another."""

    at: float
    number: int
    counts: Tally
    incidents: int  # whose feedback was counted
    golden: str  # how the golden incidents came out, in words
    refused: str = ""


class ModelChosen(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="model_chosen"):
    """The model `number` serves from here on (0: the shipped one). `pinned`: until another one is chosen; otherwise
    what is learned next takes its place."""

    at: float
    number: int
    pinned: bool
    who: str
    reason: str = ""


Record = (
    AlertsReceived
    | PayloadReceived
    | AlertQuarantined
    | IncidentMoved
    | Diagnosed
    | PlanMade
    | PlanConfirmed
    | PlanDeclined
    | ApprovalGiven
    | StepRecorded
    | BreakerRecorded
    | Noted
    | AgentStarted
    | PauseSet
    | FeedbackGiven
    | ModelMade
    | ModelChosen
    | ChangeTold
    | GatewayCompared
    | GatewayJudged
    | ChannelMoved
)

KINDS: dict[str, type] = {
    kind.__struct_config__.tag: kind  # type: ignore[misc]
    for kind in (
        AlertsReceived,
        PayloadReceived,
        AlertQuarantined,
        IncidentMoved,
        Diagnosed,
        PlanMade,
        PlanConfirmed,
        PlanDeclined,
        ApprovalGiven,
        StepRecorded,
        BreakerRecorded,
        Noted,
        AgentStarted,
        PauseSet,
        FeedbackGiven,
        ModelMade,
        ModelChosen,
        ChangeTold,
        GatewayCompared,
        GatewayJudged,
        ChannelMoved,
    )
}
VERSIONS: dict[str, int] = dict.fromkeys(KINDS, 1)


class Stored(msgspec.Struct, frozen=True):
    """A record as the journal holds it: its sequence number (from 1, no gaps) and the record."""

    seq: int
    record: Record
