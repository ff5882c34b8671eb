"""The model that serves: the shipped one, or one that takes people's feedback into account and is no worse.

Called by `agent.investigate` before every ranking (`packs`) and for an incident's precedents, and by
`agent.operations` after feedback. It holds no memory that the journal has not: which feedback counts follows from the
journal and the time, which model serves from its records. A model made from feedback serves only after every golden
incident that came out right with the shipped model came out right with it too; when the feedback is older than its
window, the shipped model serves again. It never changes evidence, rules or queries, only how much states weigh.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent import golden
from agent.config import Config
from agent.fold_model import Incident, ModelVersion
from agent.fold_state import State
from agent.journal.records import ModelChosen, ModelMade
from agent.store import Store
from rules.feedback import Tally, Windows, adjusted, tally
from rules.packs import PackSet
from rules.recurrence import Precedent, Signature, nearest, similarity, weights

logger = logging.getLogger("alertmedic.learning")
MAX_COMPARED = 2_000  # closed incidents that one is compared with, newest first
MAX_FAILED = 3  # golden incidents named in a refusal


@dataclass(slots=True)
class Learning:
    """`base` are the packs with the shipped model. Use from one event loop."""

    config: Config
    store: Store
    base: PackSet
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _made: dict[Tally, PackSet] = field(default_factory=dict, init=False)
    # The golden incidents that the shipped model gets right, and of which packs that is known.
    _right: tuple[PackSet, frozenset[Path]] | None = field(default=None, init=False)

    def rebase(self, base: PackSet) -> None:
        """Other packs serve from here on; what was learned is laid over those."""
        self.base = base
        self._made.clear()

    @property
    def windows(self) -> Windows:
        learning = self.config.learning
        return Windows(learning.window_seconds, learning.windows)

    async def packs(self, now: float) -> PackSet:
        """The packs to rank with at `now` (unix seconds); journals what had to be decided for it. Raises what the
        journal raises."""
        if not self.config.learning.enabled:
            return self.base
        async with self._lock:
            if not self.store.state.models.pinned:
                await self._follow(now)
            return self._of(self._serving())

    def _serving(self) -> ModelVersion | None:
        models = self.store.state.models
        return models.version(models.serving) if models.serving else None

    def _of(self, version: ModelVersion | None) -> PackSet:
        """The packs of a version, made once: the same counts give the same object."""
        if version is None or not version.counts:
            return self.base
        if version.counts not in self._made:
            if len(self._made) > 2:
                self._made.clear()
            self._made[version.counts] = adjusted(self.base, version.counts, f"feedback-{version.number}")
        return self._made[version.counts]

    async def _follow(self, now: float) -> None:
        """Brings the serving model in line with the feedback that counts now."""
        counts = tally(self.store.state.observations, now, self.windows)
        serving = self._serving()
        if counts == (serving.counts if serving is not None else ()):
            return
        if not counts:
            await self._choose(0, now, "the feedback is older than its window")
            return
        newest = self.store.state.models.versions[-1:]
        if not (newest and newest[0].counts == counts):
            await self._make(counts, now)
        serving = self._serving()
        if serving is not None and serving.counts != counts and not _within(serving.counts, counts):
            # What serves rests on feedback that no longer counts, and what would take its place was refused.
            await self._choose(0, now, "some of its feedback is older than its window")

    async def _make(self, counts: Tally, now: float) -> None:
        number = self.store.state.models.last + 1
        candidate = adjusted(self.base, counts, f"feedback-{number}")
        told, refused = await asyncio.to_thread(self._judged, candidate)
        observations = self.store.state.observations
        incidents = sum(1 for o in observations if tally([o], now, self.windows))
        record = ModelMade(at=now, number=number, counts=counts, incidents=incidents, golden=told, refused=refused)
        await self.store.record(record)
        logger.info("model %d: golden incidents %s%s", number, told, f"; refused: {refused}" if refused else "")

    def _judged(self, candidate: PackSet) -> tuple[str, str]:
        """(how the golden incidents come out, why the candidate may not serve). Blocks for a while."""
        directories = [golden.shipped(), *(d / "golden" for d in self.config.packs.dirs)]
        if self._right is None or self._right[0] is not self.base:
            before = golden.judge_all(directories, self.base)
            self._right = (self.base, frozenset(o.directory for o in before if not o.fault))
        right = self._right[1]
        after = golden.judge_all(directories, candidate)
        worse = [o for o in after if o.fault and o.directory in right]
        told = f"{sum(not o.fault for o in after)} of {len(after)} right, with the shipped model {len(right)}"
        if not right:
            return told, "no golden incident comes out right with the shipped model: nothing to hold it against"
        reasons = "; ".join(f"{o.name}: {o.fault}" for o in worse[:MAX_FAILED])
        more = f" and {len(worse) - MAX_FAILED} more" if len(worse) > MAX_FAILED else ""
        return told, f"{reasons}{more}" if worse else ""

    async def _choose(self, number: int, now: float, reason: str) -> None:
        await self.store.record(ModelChosen(at=now, number=number, pinned=False, who="alertmedic", reason=reason))

    def told(self) -> str:
        """Which model serves, in words, for who gave feedback."""
        models = self.store.state.models
        newest = models.versions[-1] if models.versions else None
        if models.pinned:
            return f"model {models.serving} is pinned: feedback is kept, and changes nothing until that is undone"
        if newest is not None and newest.refused:
            return f"model {newest.number} was refused, {newest.golden}: {newest.refused}"
        if models.serving:
            return f"model {models.serving} serves, golden incidents: {newest.golden if newest else ''}"
        return "the shipped model serves"


def _within(counts: Tally, whole: Tally) -> bool:
    """Whether everything that `counts` rests on is part of `whole`."""
    have = {(c.cause, c.column, c.state): (c.given, c.otherwise) for c in whole}
    return all(
        c.given <= have.get((c.cause, c.column, c.state), (0, 0))[0]
        and c.otherwise <= have.get((c.cause, c.column, c.state), (0, 0))[1]
        for c in counts
    )


def precedents(state: State, incident: Incident, signature: Signature, packs: PackSet) -> tuple[Precedent, ...]:
    """Closed incidents of the same tenant that looked alike, the most alike first."""
    weight = weights(packs)
    newest: Sequence[str] = list(state.closed)[-MAX_COMPARED:]
    past = (state.incidents[id] for id in newest if id != incident.id)
    return nearest(
        _precedent(other, similarity(signature, other.signature, weight))
        for other in past
        if other.tenant == incident.tenant and other.signature is not None
    )


def _precedent(other: Incident, alike: float) -> Precedent:
    """What is known of an earlier incident: what a person said, else what a verified action showed, else what was
    thought."""
    plan, given, diagnosis = other.plan, other.feedback, other.diagnosis
    done = plan is not None and other.plan_state == "done" and not other.only_looked
    best = diagnosis.hypotheses[0] if diagnosis is not None and diagnosis.hypotheses else None
    cause, service = (best.cause, best.service) if best is not None else ("", "")
    if plan is not None and done:
        cause, service = plan.cause, plan.service
    if given is not None:
        cause, service = given.cause, given.service
    helped = done and not (given is not None and given.helped is False)
    return Precedent(
        incident=other.id,
        at=other.closed_at or other.updated_at,
        similarity=alike,
        cause=cause,
        service=service,
        confirmed="feedback" if given is not None else "verified" if done else "",
        fixed_by=tuple(step.action for step in plan.steps) if plan is not None and helped else (),
        title=next((h.title for h in diagnosis.hypotheses if h.cause == cause), "") if diagnosis is not None else "",
    )
