"""What a person may do: approve, reject, pause, reset a breaker. Each is journalled before it is answered.

Called by `agent.http.api`, over TCP for callers with the scope `approve` and over the control socket for the command
line. Exists so that a decision has one way in, also by a signed link (`agent.signed`). It never runs anything: the
record wakes the incident's investigation, which checks the gates again.

A decision is idempotent by incident, digest and person: sent twice, or replayed, it is recorded once and answered
alike. The digest covers the plan itself, so a replay decides nothing about a later plan. Approving a suggestion makes a
request of it first: a plan of the same steps that waits for approval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from actions import guard
from actions.breaker import Breaker
from actions.model import Declined, Plan, Refusal
from actions.policy import GuardPolicy
from agent.fold_changes import PER_HOUR, ChangeTold
from agent.fold_model import Approval, Incident, IncidentState, PastPlan, person_of
from agent.http.api import ApprovalAnswer, Changed, Outcome, Said, TooMany
from agent.journal.records import (
    ApprovalGiven,
    FeedbackGiven,
    IncidentMoved,
    ModelChosen,
    Noted,
    PauseSet,
    PlanMade,
    Record,
)
from agent.learning import Learning
from agent.signed import Link, LinkError, verified
from agent.store import Store
from sandbox.failpoint import failpoint

_STALE = Refusal.APPROVAL_STALE


class Breakers(Protocol):
    """Who holds the circuit breakers: the runner of a running service, or the journal of a stopped one."""

    @property
    def breakers(self) -> Mapping[str, Breaker]: ...

    async def reset_breaker(self, key: str, reason: str = ...) -> None: ...


@dataclass(frozen=True, slots=True)
class _Decision:
    """What somebody wants. `token`: the signed link's number, "" where he came with a credential."""

    incident: str
    digest: str
    decision: Literal["approve", "reject"]
    who: str
    origin: str
    note: str
    token: str = ""

    @property
    def person(self) -> str:
        return person_of(self.who, self.origin)


class Operations:
    """Implements `agent.http.api.Operations`. `on_refused` counts the reasons of refused decisions."""

    def __init__(
        self,
        store: Store,
        runner: Breakers,
        clock: Callable[[], float] = time.time,
        policy: GuardPolicy | None = None,
        on_refused: Callable[[Refusal], None] = lambda _: None,
        learning: Learning | None = None,
    ) -> None:
        self._store = store
        self._runner = runner
        self._clock = clock
        self._policy = policy or GuardPolicy()
        self._on_refused = on_refused
        self._learning = learning

    async def approve(self, incident: str, digest: str, who: str, origin: str, note: str) -> ApprovalAnswer:
        return await self._decide(_Decision(incident, digest, "approve", who, origin, note))

    async def reject(self, incident: str, digest: str, who: str, origin: str, note: str) -> ApprovalAnswer:
        return await self._decide(_Decision(incident, digest, "reject", who, origin, note))

    async def redeem(self, token: str, key: bytes, origin: str) -> ApprovalAnswer:
        """The decision that a signed link carries, once. Anything wrong with the link is `refused`, and its text never
        says more than that it is forged, expired or used."""
        try:
            link = verified(token, key, self._clock())
        except LinkError as error:
            return ApprovalAnswer(outcome="refused", incident="", detail=str(error))
        wanted = _Decision(link.incident, link.digest, link.decision, link.person, origin, "by a signed link", link.id)
        if self._used(link):
            return ApprovalAnswer(outcome="refused", incident=link.incident, detail="the link was used already")
        return await self._decide(wanted)

    async def pause(self, paused: bool, who: str, origin: str, note: str) -> None:
        await self._store.record(PauseSet(at=self._clock(), paused=paused, who=f"{who} ({origin})", note=note))

    async def reset_breaker(self, key: str, who: str, origin: str, note: str) -> bool:
        if key not in self._runner.breakers and key not in self._store.state.breakers:
            return False
        await self._runner.reset_breaker(key, f"reset by {who} ({origin})" + (f": {note}" if note else ""))
        return True

    async def feedback(self, incident: str, said: Said, who: str, origin: str) -> str:
        learning = self._learning
        if learning is not None and said.cause not in learning.base.causes:
            raise ValueError(f"no pack knows the cause {said.cause[:100]!r}")
        now = self._clock()
        given = FeedbackGiven(
            at=now,
            incident=incident,
            cause=said.cause,
            service=said.service,
            helped=said.helped,
            who=who,
            origin=origin,
            note=said.note,
        )
        await self._store.record(given)
        if learning is None:
            return "no service is running: the model is made, and held against the golden incidents, when one is"
        await learning.packs(now)
        return learning.told()

    async def change(self, change: Changed, who: str, origin: str) -> bool:
        now = self._clock()
        told = ChangeTold(at=now, who=who, origin=origin, **msgspec.structs.asdict(change))
        mine = [c for c in self._store.state.changes if c.tenant == change.tenant]
        if any(c.key == told.key for c in mine):
            return False
        if sum(c.at > now - 3600.0 for c in mine) >= PER_HOUR:
            raise TooMany(f"more than {PER_HOUR} changes of tenant {change.tenant} within an hour")
        await self._store.record(told)
        return True

    async def use_model(self, version: int | None, who: str, origin: str, note: str) -> int:
        models = self._store.state.models
        number = models.serving if version is None else version
        pinned = version is not None
        record = ModelChosen(at=self._clock(), number=number, pinned=pinned, who=f"{who} ({origin})", reason=note)
        await self._store.record(record)
        return self._store.state.models.serving

    async def revert_model(self, who: str, origin: str, note: str) -> int:
        models = self._store.state.models
        number = models.earlier[-1] if models.earlier else 0
        return await self.use_model(number, who, origin, note or f"back from model {models.serving}")

    def _used(self, link: Link) -> bool:
        incident = self._store.state.incident(link.incident)
        return incident is not None and any(a.token == link.id for a in incident.approvals)

    async def _decide(self, wanted: _Decision) -> ApprovalAnswer:
        """Refusals are not journalled as decisions, but the story tells of the attempt."""
        incident = self._store.state.incident(wanted.incident)
        if incident is None:
            return ApprovalAnswer(outcome="unknown_incident", incident=wanted.incident, detail="no such incident")
        replaced = _replaced(incident, wanted.digest) is not None  # what was said of it then leads to nothing any more
        if not replaced and (before := _given(incident, wanted)) is not None:
            return _answer(incident, before, again=True)
        now = self._clock()
        refused = _refusal(incident, wanted.digest, now)
        if refused is None and incident.plan_state == "suggested" and wanted.decision == "reject":
            what = "it is only suggested: nothing waits, so there is nothing to reject"
            refused = "nothing_waiting", what, Refusal.SUGGEST_ONLY
        plan: Plan | Declined | None = incident.plan
        taken = incident.state is IncidentState.SUGGESTED and wanted.decision == "approve"
        if refused is None and incident.plan is not None and incident.plan_state == "suggested":
            plan = guard.taken(incident.plan, self._policy, now)
        if isinstance(plan, Declined):
            refused = "refused", plan.detail, plan.reason
        if refused is not None or not isinstance(plan, Plan):
            outcome, detail, reason = refused or ("nothing_waiting", "there is no plan", Refusal.NO_PROPOSAL)
            self._on_refused(reason)
            text = f"{wanted.who} ({wanted.origin}) wanted to {wanted.decision}: {detail} ({reason})"
            await self._store.record(Noted(at=now, incident=incident.id, text=text))
            return ApprovalAnswer(outcome=outcome, incident=incident.id, detail=detail)
        return await self._record(incident, plan, wanted, now, taken=taken)

    async def _record(
        self, incident: Incident, plan: Plan, wanted: _Decision, now: float, *, taken: bool
    ) -> ApprovalAnswer:
        given = ApprovalGiven(
            at=now,
            incident=incident.id,
            plan=plan.id,
            digest=plan.digest,
            decision=wanted.decision,
            who=wanted.who,
            origin=wanted.origin,
            note=wanted.note,
            asked=wanted.digest if taken else "",
            token=wanted.token,
        )
        records: list[Record] = [given]
        if taken:
            what = f"{wanted.who} ({wanted.origin}) makes a request of the suggestion"
            moved = IncidentMoved(
                at=now, incident=incident.id, before=incident.state, after=IncidentState.AWAITING_APPROVAL, reason=what
            )
            # A crash may have left a request without the rest of this write: it is gone on with.
            made = [] if plan is incident.plan else [PlanMade(at=now, plan=plan)]
            records = [*made, moved, given]
        await self._store.record(*records)
        failpoint("operations_after_approval")
        # Two decisions at once: the fold counts one of them, and that is the one to tell of.
        after = self._store.state.incident(incident.id)
        mine = [a for a in after.approvals if (a.plan, a.who, a.at) == (plan.id, wanted.who, now)] if after else []
        if after is None or not mine:
            return ApprovalAnswer(outcome="refused", incident=incident.id, plan=plan.id, detail="the incident is gone")
        if not mine[-1].counted and (before := _given(after, wanted)) is not None:
            return _answer(after, before, again=True)
        return _answer(after, mine[-1])


def _given(incident: Incident, wanted: _Decision) -> Approval | None:
    """The same decision of the same person, which counted."""
    same = (a for a in incident.approvals if a.counted and wanted.digest and wanted.digest in (a.digest, a.asked))
    return next((a for a in same if (a.decision, a.person) == (wanted.decision, wanted.person)), None)


def _answer(incident: Incident, given: Approval, *, again: bool = False) -> ApprovalAnswer:
    if not given.counted:
        return ApprovalAnswer(outcome="refused", incident=incident.id, plan=given.plan, detail=given.why)
    detail = "this was recorded before; nothing has changed" if again else ""
    outcome: Outcome = "approved" if given.decision == "approve" else "rejected"
    waiting = incident.plan is not None and incident.plan.id == given.plan and incident.plan_state == "waiting"
    if outcome == "approved" and waiting:
        outcome = "partly_approved"
        detail = "; ".join(filter(None, [detail, "another person must approve it too"]))
    elif outcome == "approved" and _looked_at(incident):
        what = "the incident is being looked at again: it begins when that comes to the same plan"
        detail = "; ".join(filter(None, [detail, what]))
    return ApprovalAnswer(outcome=outcome, incident=incident.id, plan=given.plan, detail=detail)


def _replaced(incident: Incident, digest: str) -> PastPlan | None:
    """The plan of that digest, where another one took its place before anything of it ran."""
    return next((past for past in incident.past if digest and past.digest == digest), None)


def _looked_at(incident: Incident) -> bool:
    """A newer look is under way while its plan waits, or was just decided on."""
    looking = incident.state in (IncidentState.INVESTIGATING, IncidentState.DIAGNOSED)
    return looking and incident.plan_state in ("waiting", "approved", "rejected")


def _refusal(incident: Incident, digest: str, now: float) -> tuple[Outcome, str, Refusal] | None:
    """Why a decision on the incident cannot be taken now."""
    decidable = (IncidentState.AWAITING_APPROVAL, IncidentState.SUGGESTED)
    past = _replaced(incident, digest)
    if past is not None:
        what = f"another plan took the place of {past.plan}: {past.why}; look at the incident again"
        return "stale_digest", what, _STALE
    if incident.plan is None or not (incident.state in decidable or _looked_at(incident)):
        what = f"nothing waits for approval, the incident is {incident.state}"
        return "nothing_waiting", what, _STALE
    if incident.plan_digest != digest:
        what = "the digest is not that of the incident's plan now: look at it again"
        return "stale_digest", what, _STALE
    if incident.plan_state not in ("waiting", "suggested"):
        return "refused", f"it was decided already: the plan is {incident.plan_state}", _STALE
    if now >= incident.plan.expires_at:
        return "expired", "the plan has expired", Refusal.APPROVAL_EXPIRED
    return None
