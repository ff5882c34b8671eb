"""The whole story of one incident, on one page.

`agent.app` calls `Investigation.advance` for every incident that changed, one call at a time per incident. It is
level-triggered: each call looks at the folded incident, does the next thing, and records it, until the incident waits
for something (a person, a time, a step that runs); it then answers when to look again. It keeps no memory of its own,
so that after a crash the same function goes on from the journal.

    open -> investigating: gather evidence, rank hypotheses -> diagnosed: ask the guard
      -> suggested | awaiting_approval | acting | declined -> verifying: look at the series -> resolved | escalated

"Resolved" from Alertmanager is a claim: it withdraws what has not begun and leads to verifying. Only series close an
incident, or, where there are none to be had, the claim, and the story says so. Nothing is done here that is not
announced in the journal first, and an exception here escalates the incident instead of losing it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from actions.model import Declined, Plan, Refusal
from actions.runner import PlanOutcome
from agent import log
from agent.config import Config
from agent.engines import Engine, matched
from agent.fold_model import FINAL, Incident, IncidentState
from agent.fold_story import plain
from agent.journal.records import Diagnosed, IncidentMoved, Noted, PlanConfirmed, PlanDeclined, PlanMade, Record
from agent.journal.wal import JournalError
from agent.learning import Learning, precedents
from agent.remediation import Remediation
from agent.situation import Situations
from agent.store import Store
from agent.telemetry import Telemetry
from agent.verify import SeriesVerifier
from rules.diagnose import conclude, observe
from rules.model import Alert, Diagnosis, Situation
from rules.packs import PackSet
from rules.recurrence import Signature, signature_of
from rules.verify import Justification, justification_of, symptoms_of
from sandbox.failpoint import failpoint

logger = logging.getLogger("alertmedic.investigate")
_I = IncidentState
CLAIMABLE = frozenset({_I.OPEN, _I.INVESTIGATING, _I.DIAGNOSED, _I.SUGGESTED, _I.AWAITING_APPROVAL, _I.DECLINED})
# The shortest legal way to `escalated` from each state.
_WAY_OUT: dict[IncidentState, tuple[IncidentState, ...]] = {
    _I.OPEN: (_I.ESCALATED,),
    _I.INVESTIGATING: (_I.ESCALATED,),
    _I.DIAGNOSED: (_I.DECLINED, _I.ESCALATED),
    _I.SUGGESTED: (_I.ESCALATED,),
    _I.AWAITING_APPROVAL: (_I.DECLINED, _I.ESCALATED),
    _I.ACTING: (_I.ESCALATED,),
    _I.DECLINED: (_I.ESCALATED,),
    _I.VERIFYING: (_I.ESCALATED,),
}
RETRY_SECONDS = 5.0  # after the journal was unavailable
MAX_INTERRUPTIONS = 5  # of a plan, one after the other, until a person gets it
STALE_LOOKS = 2  # beyond the rounds, where evidence grew old before a plan was made (a restart)
WEAK = frozenset({Refusal.LOW_POSTERIOR, Refusal.LOW_MARGIN})


@dataclass(frozen=True, slots=True)
class Ranked:
    """What one look came to."""

    diagnosis: Diagnosis
    justification: Justification
    signature: Signature


@dataclass(slots=True)
class Investigation:
    """What an investigation works with. `advance` is the only way in."""

    config: Config
    packs: PackSet
    store: Store
    situations: Situations
    remediation: Remediation
    verifier: SeriesVerifier
    telemetry: Telemetry
    wake: Callable[[str, float], None]  # look at the incident again at that time
    shadow: Callable[[Incident, Situation, Diagnosis], None] = lambda *_: None  # told of each look; it must not block
    first: Callable[[], AbstractContextManager[None]] = nullcontext  # around each diagnosis: nothing competes with it
    clock: Callable[[], float] = time.time
    learning: Learning | None = None  # None: only the shipped model ranks
    engine: Engine | None = None  # None: the built-in one
    acting: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _cancel: dict[str, asyncio.Event] = field(default_factory=dict)
    _interruptions: dict[str, int] = field(default_factory=dict)

    async def advance(self, id: str) -> float | None:
        """Do what can be done for the incident now. Answers when to look again (unix seconds), None: when it changes.

        Raises only what the journal raises; any other failure escalates the incident, with its reason in the story.
        """
        with log.incident(id):
            try:
                return await self._advance(id)
            except JournalError:
                raise
            except Exception as error:  # noqa: BLE001 - one of the two places: an incident is never lost to a bug
                return await self._broken(id, error)

    async def _advance(self, id: str) -> float | None:
        while True:
            incident = self.store.state.incident(id)
            if incident is None or incident.final:
                return None
            if not incident.firing and incident.state in CLAIMABLE:
                await self._move(incident, _I.VERIFYING, "Alertmanager says resolved; the series will tell")
                continue
            if incident.state is _I.VERIFYING and id in self.acting:
                return None  # the task that acted is about to close it, and wakes it if it cannot
            before = incident.updated_seq
            wake = await self._steps[incident.state](self, incident)
            after = self.store.state.incident(id)
            if after is None or after.updated_seq == before:
                return wake

    # -- one function per state; each records what it did, or answers when to look again ------------------------------

    async def _open(self, incident: Incident) -> float | None:
        await self._move(incident, _I.INVESTIGATING, "")
        return None

    async def _investigating(self, incident: Incident) -> float | None:
        """Evidence, then the ranking: one record, so that a crash leaves both or neither."""
        failpoint("investigate_before_evidence")
        begun = time.perf_counter()
        seen = self.store.state.seq
        with self.telemetry.stage("evidence", incident.id, incident.traceparent):
            situation = await self.situations.of(incident, self.store.state)
        for evidence in situation.evidence:
            self.telemetry.evidence(evidence.source, missing=evidence.missing is not None)
        failpoint("investigate_after_evidence")
        if (kept := self.config.investigate.recordings) is not None:
            await asyncio.to_thread(keep, kept / f"{incident.id}-{incident.reopened}-{incident.rounds}", situation)
        gathered = time.perf_counter()
        with self.telemetry.stage("diagnosis", incident.id, incident.traceparent):
            packs = self.packs if self.learning is None else await self.learning.packs(self.clock())
            with self.first():
                ranked = await asyncio.to_thread(self._rank, situation, packs)
        diagnosis = ranked.diagnosis
        self.telemetry.hypotheses_generated(len(diagnosis.hypotheses))
        failpoint("investigate_before_diagnosed")
        now = self.clock()
        await self._record(
            Diagnosed(
                at=now,
                incident=incident.id,
                diagnosis=diagnosis,
                evidence_seconds=gathered - begun,
                diagnosis_seconds=time.perf_counter() - gathered,
                evidence_at=situation.until,
                justification=ranked.justification,
                seen=seen,
                signature=ranked.signature,
                precedents=precedents(self.store.state, incident, ranked.signature, packs),
            ),
            self._moved(incident, _I.DIAGNOSED, "", at=now),
        )
        failpoint("investigate_after_diagnosed")
        self.shadow(incident, situation, diagnosis)
        return None

    async def _diagnosed(self, incident: Incident) -> float | None:
        """The guard's word on the best proposal; a weak answer is looked at again while there are rounds left."""
        if incident.has_news and incident.plan_state != "approved":  # that was given while news came: it is not put off
            await self._move(incident, _I.INVESTIGATING, "more alerts came in")
            return None
        diagnosis = incident.diagnosis
        again = incident.rounds < self.config.investigate.rounds
        due = incident.evidence_at + self.config.investigate.round_seconds
        if diagnosis is None or diagnosis.best is None:
            if again:
                return await self._again(incident, due, "the evidence was insufficient")
            refused = Declined(reason=Refusal.NO_PROPOSAL, detail="the evidence is insufficient")
            await self._decline(incident, refused)
            return None
        with self.telemetry.stage("plan", incident.id, incident.traceparent):
            plan = await self.remediation.consider(incident)
        if isinstance(plan, Declined):
            # Bounded: where gathering takes longer than evidence may be old, every look would end here.
            looks = self.config.investigate.rounds + STALE_LOOKS
            if plan.reason is Refusal.STALE_EVIDENCE and incident.rounds < looks:
                return await self._again(incident, due, "the evidence had grown old")
            if again and plan.reason is Refusal.NO_PROPOSAL and self._weak(diagnosis):
                return await self._again(incident, due, f"no remedy, and little speaks for {diagnosis.best.cause} yet")
            await self._decline(incident, plan)
            return None
        if again and WEAK & set(plan.demoted_by):
            return await self._again(incident, due, "no hypothesis stands clear enough")
        await self._plan(incident, plan)
        return None

    def _weak(self, diagnosis: Diagnosis) -> bool:
        """Whether a better explanation may still show: the best cause only says where the trouble is (it is of a pack
        that is asked where no other explains anything, or says what is seen and not why), or stands less clear than
        would be acted upon."""
        best, guard = diagnosis.best, self.config.guard
        if best is None or best.cause in self.packs.fallback_causes:
            return True
        if best.cause in self.packs.causes and self.packs.causes[best.cause].generic:
            return True
        return best.posterior < guard.min_posterior or diagnosis.margin < guard.min_margin

    async def _plan(self, incident: Incident, plan: Plan) -> None:
        """The plan of this look. Where it is the one that waits already, that stays: people may hold links to it."""
        state = {"auto": _I.ACTING, "approve": _I.AWAITING_APPROVAL}.get(plan.autonomy, _I.SUGGESTED)
        reason = "; ".join(plan.notes) if state is not _I.ACTING else plan.reason
        refusal = plan.demoted_by[0] if plan.demoted_by else None
        now, before = self.clock(), incident.plan
        why = ""
        if before is not None and incident.plan_state not in ("running", "done", "failed"):
            why = incident.why_not_confirmed(now) or self.remediation.differs(before, plan)
            if not why:
                failpoint("investigate_before_confirmed")
                confirmed = PlanConfirmed(at=now, incident=incident.id, plan=before.id)
                await self._record(confirmed, self._moved(incident, state, reason, refusal))
                return
        for demotion in plan.demoted_by:
            self.telemetry.refused(demotion)
        failpoint("investigate_before_plan")
        await self._record(
            PlanMade(at=now, plan=plan, replaces=before.id if before is not None and why else "", why=why),
            self._moved(incident, state, reason, refusal if state is not _I.ACTING else None),
        )
        failpoint("investigate_after_plan")

    async def _suggested(self, incident: Incident) -> float | None:
        if incident.has_news:
            await self._move(incident, _I.INVESTIGATING, "more alerts came in")
            return None
        expires = incident.plan.expires_at if incident.plan else 0.0
        if self.clock() < expires:
            return expires
        await self._move(incident, _I.ESCALATED, "nobody took the suggestion", incident.refusal)
        return None

    async def _awaiting_approval(self, incident: Incident) -> float | None:
        plan = incident.plan
        if incident.has_news and incident.plan_state == "waiting":  # what waits was made without knowing of them
            await self._move(incident, _I.INVESTIGATING, "more alerts came in")
            return None
        if incident.plan_state == "rejected":
            refused = Declined(reason=Refusal.APPROVAL_REJECTED, detail="a person rejected the plan")
            await self._decline(incident, refused)
            return None
        if plan is None or self.clock() >= plan.expires_at:
            refused = Declined(reason=Refusal.APPROVAL_EXPIRED, detail="nobody approved the plan in time")
            await self._decline(incident, refused)
            return None
        if incident.plan_state != "approved":
            return plan.expires_at
        if (refusal := self.remediation.recheck(incident)) is not None:
            await self._decline(incident, refusal)
            return None
        await self._move(incident, _I.ACTING, "approved")
        return None

    async def _acting(self, incident: Incident) -> float | None:
        """The steps run in a task of their own: a slot of the schedule is not held for them."""
        if not incident.firing and (cancel := self._cancel.get(incident.id)) is not None:
            cancel.set()
        if incident.id not in self.acting:
            cancel = self._cancel[incident.id] = asyncio.Event()
            if not incident.firing:
                cancel.set()
            task = asyncio.create_task(self._act(incident.id, cancel), name=f"act {incident.id}")
            self.acting[incident.id] = task
        return None

    async def _declined(self, incident: Incident) -> float | None:
        if incident.has_news:
            await self._move(incident, _I.INVESTIGATING, "more alerts came in")
            return None
        await self._move(incident, _I.ESCALATED, incident.reason or "nothing may be done here", incident.refusal)
        return None

    async def _verifying(self, incident: Incident) -> float | None:
        """One look at the series. They decide; a claim without any series to look at is believed, and said to be. A
        firing alert that comes during the look reopens what the look closes (`seen`)."""
        seen = self.store.state.seq
        if incident.firing and incident.only_looked:
            await self._move(incident, _I.INVESTIGATING, "what else may be done, after the look")
            return None
        blind = incident.justification is None or not incident.justification.series
        if incident.firing and (blind or (incident.has_news and incident.plan_state != "done")):
            await self._move(incident, _I.INVESTIGATING, "it fires again")
            return None
        if incident.news and incident.plan_state == "done":
            later = await self._later(incident)
            if later is not None:
                return later
        ended = max((a.ends_at or a.starts_at for a in incident.alerts.values()), default=incident.updated_at)
        claimed = min(ended, incident.updated_at)  # a sender's clock may be ahead: its future has no samples
        if blind:
            situation = await self.situations.of(incident, self.store.state)
            justification = await asyncio.to_thread(symptoms_of, situation, self.packs)
            if not justification.series:
                looked = any(evidence.frame.ids for evidence in situation.evidence)
                what = "and no series of the symptom is bad" if looked else "and there are no series to look at"
                await self._move(incident, _I.RESOLVED, f"Alertmanager says resolved, {what}", seen=seen)
                return None
            verdict = await self.verifier.judged(incident, justification, claimed)
        else:
            verdict = await self.verifier.look(incident, claimed)
        if verdict.recovered:
            await self._move(incident, _I.RESOLVED, verdict.text, seen=seen)
            return None
        now = self.clock()
        due = incident.moved_at + self.config.verify.deadline_seconds
        if incident.firing and incident.rounds < self.config.investigate.rounds:
            await self._move(incident, _I.INVESTIGATING, f"not recovered: {verdict.text}")
            return None
        if now < due:
            return min(due, now + self.config.verify.poll_seconds)
        if incident.rounds < self.config.investigate.rounds:
            await self._move(incident, _I.INVESTIGATING, f"said to be resolved, but {verdict.text}")
            return None
        await self._move(incident, _I.ESCALATED, f"not verified: {verdict.text}", seen=seen)
        return None

    async def _later(self, incident: Incident) -> float | None:
        """About alerts that joined while the incident was being healed: when to look again, None when they are over.

        Often they are echoes of the fault that is over, so their own services' series get the time of a verification to
        come back. What does not, or has no series to look at and still fires then, is looked into."""
        situation = await self.situations.of(incident, self.store.state)
        over = True
        for service in sorted({self._service_of(alert) for alert in incident.news}):
            seen = await asyncio.to_thread(symptoms_of, replace(situation, entry=service), self.packs)
            good = bool(seen.series) and (await self.verifier.judged(incident, seen, incident.moved_at)).recovered
            over = over and good
        if over:
            return None
        due = incident.moved_at + self.config.verify.deadline_seconds
        if self.clock() < due:
            return min(due, self.clock() + self.config.verify.poll_seconds)
        names = ", ".join(sorted({alert.name for alert in incident.news})[:3])
        await self._move(incident, _I.INVESTIGATING, f"{names} joined while it was being healed, and is not over")
        return self.clock()

    def _service_of(self, alert: Alert) -> str:
        return next((v for label in self.config.service_labels if (v := alert.labels.get(label, ""))), "")

    # -- what the states share ---------------------------------------------------------------------------------------

    def _rank(self, situation: Situation, packs: PackSet) -> Ranked:
        """Pure work, off the loop. The justification is the best hypothesis', or the symptom's alone."""
        observer = matched(observe(situation, packs), self.engine)
        diagnosis = conclude(observer)
        best = diagnosis.best
        justified = symptoms_of(situation, packs) if best is None else justification_of(situation, best, packs)
        return Ranked(diagnosis, justified, signature_of(observer))

    async def _again(self, incident: Incident, due: float, why: str) -> float | None:
        """Another round of investigation, not before `due`."""
        if self.clock() < due:
            return due
        await self._move(incident, _I.INVESTIGATING, f"{why}: looking again")
        return None

    async def _decline(self, incident: Incident, declined: Declined) -> None:
        self.telemetry.refused(declined.reason)
        await self._record(
            PlanDeclined(
                at=self.clock(),
                incident=incident.id,
                action=declined.action,
                refusal=declined.reason,
                detail=declined.detail,
            ),
            self._moved(incident, _I.DECLINED, declined.detail, declined.reason),
        )

    def _moved(
        self,
        incident: Incident,
        after: IncidentState,
        reason: str,
        refusal: Refusal | None = None,
        *,
        at: float | None = None,
        seen: int = 0,
    ) -> IncidentMoved:
        waits = incident.state in (_I.AWAITING_APPROVAL, _I.DIAGNOSED) and incident.plan_state in (
            "waiting",
            "approved",
        )
        return IncidentMoved(
            at=self.clock() if at is None else at,
            incident=incident.id,
            before=incident.state,
            after=after,
            reason=reason,
            refusal=refusal,
            seen=seen,
            keeps_plan=waits and after is _I.INVESTIGATING,
        )

    async def _move(
        self, incident: Incident, after: IncidentState, reason: str, refusal: Refusal | None = None, *, seen: int = 0
    ) -> None:
        """`seen`: newest record that the decision knew of, where it took a while; 0: it is made on the state now."""
        await self._record(self._moved(incident, after, reason, refusal, seen=seen))
        if after in FINAL:
            self._ended(incident.id, after, reason)

    async def _record(self, *records: Record) -> None:
        with self.telemetry.stage("journal_append"):
            await self.store.record(*records)

    def _ended(self, id: str, state: IncidentState, reason: str) -> None:
        incident = self.store.state.incident(id)
        if incident is not None and not incident.final:  # an alert came during the look (`seen`)
            logger.info("incident %s: %s; it fires again", id, reason, extra={"state": incident.state})
            return
        logger.info("incident %s: %s", id, reason, extra={"state": state})
        if incident is None or self.telemetry.tracing is None:
            return
        best = incident.diagnosis.best if incident.diagnosis else None
        self.telemetry.tracing.incident_ended(
            id,
            incident.traceparent,
            opened_at=incident.opened_at,
            ended_at=incident.closed_at or self.clock(),
            attributes={"incident.state": state, "incident.cause": best.cause if best else ""},
            ok=state is _I.RESOLVED,
        )

    # -- acting: a task of its own per incident ----------------------------------------------------------------------

    async def _act(self, id: str, cancel: asyncio.Event) -> None:
        incident = self.store.state.incident(id)
        if incident is None:
            return
        with log.incident(id):
            await self._act_named(id, incident, cancel)

    async def _act_named(self, id: str, incident: Incident, cancel: asyncio.Event) -> None:
        again: float | None = None
        try:
            try:
                again = await self._acted(id, await self.remediation.run(incident, cancel))
            except JournalError:
                raise
            except Exception as error:  # noqa: BLE001 - the same place, in the task that acts
                again = await self._broken(id, error)
        except JournalError as error:
            # What was not recorded did not happen, as far as the state goes: the next look recovers from the last move.
            logger.error("incident %s: %s", id, error)
            again = self.clock() + RETRY_SECONDS
        finally:
            self.acting.pop(id, None)
            self._cancel.pop(id, None)
        # What came in meanwhile found it acting, and went away again.
        self.wake(id, self.clock() if again is None else again)

    async def _acted(self, id: str, outcome: PlanOutcome) -> float | None:
        incident = self.store.state.incident(id)
        if incident is None or incident.state is not _I.ACTING:
            return None
        if outcome.result == "interrupted":
            return await self._interrupted(incident, outcome.reason)
        self._interruptions.pop(id, None)
        if outcome.result in {"cancelled", "denied", "expired"}:
            refusal = outcome.refusal or Refusal.RESOLVED_BEFORE_START
            await self._decline(incident, Declined(reason=refusal, detail=outcome.reason))
            return None
        recovered = outcome.result == "verified"
        if incident.only_looked:
            came = "what it captured is kept" if recovered else f"the look failed ({outcome.reason})"
            await self._move(incident, _I.VERIFYING, f"it only looked: {came}, nothing was changed")
            return None
        if recovered:
            await self._move(incident, _I.VERIFYING, "the steps ran, and the series are good again")
            self.telemetry.hypothesis_successful()
        else:
            await self._move(incident, _I.ESCALATED, outcome.reason, outcome.refusal)
        # Counted once the journal has it, since what it did not take is done again.
        self.telemetry.healing_started()
        self.telemetry.healing_ended(recovered=recovered)
        if recovered:
            failpoint("investigate_after_verifying")
            # What joined while it was being healed was not healed with it: `_verifying` looks at that first.
            if (verifying := self.store.state.incident(id)) is not None and not verifying.news:
                await self._move(verifying, _I.RESOLVED, outcome.reason, seen=verifying.updated_seq)
        return None

    async def _interrupted(self, incident: Incident, reason: str) -> float | None:
        """The journal did not take a move, or contradicts itself: the next look recovers from the last move that it did
        take. A plan that comes to no end in this way while the journal takes other records is a person's."""
        logger.error("incident %s: %s", incident.id, reason)
        count = self._interruptions[incident.id] = self._interruptions.get(incident.id, 0) + 1
        if count < MAX_INTERRUPTIONS:
            return self.clock() + RETRY_SECONDS
        if incident.unsettled:  # an effect may be under way: it stays with us, and is told once
            if count == MAX_INTERRUPTIONS:
                text = f"the plan cannot go on: {reason}"[:500]
                await self._record(Noted(at=self.clock(), incident=incident.id, text=text))
            return self.clock() + RETRY_SECONDS
        await self._move(incident, _I.ESCALATED, f"the plan cannot go on: {reason}"[:500])
        self._interruptions.pop(incident.id, None)
        return None

    async def _broken(self, id: str, error: Exception) -> float | None:
        """Our own failure is an incident's end like any other: told, and a person gets it. Answers when to look again.
        Raises only what the journal raises: whoever calls it must go on with other incidents."""
        logger.error("incident %s: the investigation failed", id, exc_info=error)
        try:
            return await self._given_up(id, f"the investigation failed: {type(error).__name__}: {error}"[:500])
        except JournalError:
            raise
        except Exception:  # the state moved on meanwhile, or cannot: the next look sees which
            logger.exception("incident %s: it cannot be given to a person now", id)
            return self.clock() + RETRY_SECONDS

    async def _given_up(self, id: str, reason: str) -> float | None:
        incident = self.store.state.incident(id)
        if incident is None or incident.final:
            return None
        if incident.unsettled:
            if not any(plain(reason, 600) == line.text for line in incident.story):  # once, not with every attempt
                await self._record(Noted(at=self.clock(), incident=id, text=reason))
            return self.clock() + RETRY_SECONDS
        for state in _WAY_OUT[incident.state]:
            current = self.store.state.incident(id)
            if current is not None and not current.final:
                await self._move(current, state, reason)
        return None

    _steps: dict[IncidentState, Callable[[Investigation, Incident], Awaitable[float | None]]] = field(
        init=False,
        default_factory=lambda: {
            _I.OPEN: Investigation._open,
            _I.INVESTIGATING: Investigation._investigating,
            _I.DIAGNOSED: Investigation._diagnosed,
            _I.SUGGESTED: Investigation._suggested,
            _I.AWAITING_APPROVAL: Investigation._awaiting_approval,
            _I.ACTING: Investigation._acting,
            _I.DECLINED: Investigation._declined,
            _I.VERIFYING: Investigation._verifying,
        },
    )


def keep(directory: Path, situation: Situation) -> None:
    """Writes a recording of the look, unless one of that name is there: a crash repeats the look, not the file."""
    from agent.sources.recorded import write_recording

    if not (directory / "alert.json").exists():
        write_recording(directory, situation)
