"""What a person may do: approve, reject, pause, reset a breaker. Each is journalled before it is answered.

Called by `agent.http.api`, over TCP for callers with the scope `approve` and over the control socket for the command
line. Exists so that a decision has one way in. It never runs anything: the record wakes the incident's investigation,
which checks the gates again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

from actions.breaker import Breaker
from agent.fold_model import Incident, IncidentState
from agent.http.api import ApprovalAnswer, Outcome
from agent.journal.records import ApprovalGiven, Noted, PauseSet
from agent.store import Store
from sandbox.failpoint import failpoint


class Breakers(Protocol):
    """Who holds the circuit breakers: the runner of a running service, or the journal of a stopped one."""

    @property
    def breakers(self) -> Mapping[str, Breaker]: ...

    async def reset_breaker(self, key: str, reason: str = ...) -> None: ...


class Operations:
    """Implements `agent.http.api.Operations`."""

    def __init__(self, store: Store, runner: Breakers, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._runner = runner
        self._clock = clock

    async def approve(self, incident: str, digest: str, who: str, origin: str, note: str) -> ApprovalAnswer:
        return await self._decide(incident, digest, "approve", (who, origin, note))

    async def reject(self, incident: str, digest: str, who: str, origin: str, note: str) -> ApprovalAnswer:
        return await self._decide(incident, digest, "reject", (who, origin, note))

    async def pause(self, paused: bool, who: str, origin: str, note: str) -> None:
        await self._store.record(PauseSet(at=self._clock(), paused=paused, who=f"{who} ({origin})", note=note))

    async def reset_breaker(self, key: str, who: str, origin: str, note: str) -> bool:
        if key not in self._runner.breakers and key not in self._store.state.breakers:
            return False
        await self._runner.reset_breaker(key, f"reset by {who} ({origin})" + (f": {note}" if note else ""))
        return True

    async def _decide(
        self, id: str, digest: str, decision: Literal["approve", "reject"], by: tuple[str, str, str]
    ) -> ApprovalAnswer:
        """Refusals are not journalled as decisions, but the story tells of the attempt."""
        incident = self._store.state.incident(id)
        if incident is None:
            return ApprovalAnswer(outcome="unknown_incident", incident=id, detail="no such incident")
        who, origin, note = by
        now = self._clock()
        if (refused := _refusal(incident, digest, now)) is not None:
            outcome, detail = refused
            await self._store.record(
                Noted(at=now, incident=id, text=f"{who} ({origin}) wanted to {decision}: {detail}")
            )
            return ApprovalAnswer(outcome=outcome, incident=id, detail=detail)
        plan = incident.plan
        assert plan is not None
        await self._store.record(
            ApprovalGiven(
                at=now, incident=id, plan=plan.id, digest=digest, decision=decision, who=who, origin=origin, note=note
            )
        )
        failpoint("operations_after_approval")
        # Two decisions at once: the fold counts one of them, and that is the one to tell of.
        after = self._store.state.incident(id)
        mine = [a for a in after.approvals if (a.plan, a.who, a.at) == (plan.id, who, now)] if after else []
        if mine and not mine[-1].counted:
            return ApprovalAnswer(outcome="refused", incident=id, plan=plan.id, detail=mine[-1].why)
        done: Outcome = "approved" if decision == "approve" else "rejected"
        return ApprovalAnswer(outcome=done, incident=id, plan=plan.id)


def _refusal(incident: Incident, digest: str, now: float) -> tuple[Outcome, str] | None:
    """Why a decision on the incident cannot be taken now."""
    if incident.state is not IncidentState.AWAITING_APPROVAL or incident.plan is None:
        if incident.state is IncidentState.SUGGESTED:
            hint = "it is only suggested: the autonomy level must be at least `approve` for it"
            return "nothing_waiting", hint
        return "nothing_waiting", f"nothing waits for approval, the incident is {incident.state}"
    if incident.plan_digest != digest:
        return "stale_digest", "the digest is not that of the waiting plan: look at it again"
    if incident.plan_state != "waiting":
        return "refused", f"it was decided already: the plan is {incident.plan_state}"
    if now >= incident.plan.expires_at:
        return "expired", "the plan has expired"
    return None
