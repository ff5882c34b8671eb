"""What the metrics store holds of the same time a day or a week ago.

Called by `agent.situation` for every look that is to be diagnosed. Exists so that a peak that comes every night is not
taken for an anomaly (`rules.seasons`). It is cheap: one instant query asks, beside the evidence itself, whether the
store reaches back so far; if it does, only what moved today (and what a peak may be missing from) is asked again, over
the half hour before the onset and the time since, within what the look has left of its deadline and its budget. It
never keeps anything, and never fails a look: what did not arrive is `Evidence(missing=reason)`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from agent.sources import Budget, EvidenceRequest, Source, bounded, gather
from agent.sources.prometheus import PrometheusSource, QueryError
from rules.model import Evidence, History

NAME = "history"  # of the evidence that says what of it is missing
BEFORE_SECONDS = 1800.0  # before the onset: enough for a baseline
# What every store of Prometheus metrics has at any time: targets that are scraped, or resources that push.
_ANYTHING = "count(up offset {0}s) or count(target_info offset {0}s)"
_LABEL = "offset"


@dataclass(frozen=True, slots=True)
class Archive:
    """The history that one source holds, at `offsets` (seconds before)."""

    source: PrometheusSource
    offsets: tuple[float, ...]

    @classmethod
    def of(cls, sources: Sequence[Source], offsets: Sequence[float]) -> Archive | None:
        """None where no source has a past, or none is to be looked at."""
        source = next((s for s in sources if isinstance(s, PrometheusSource)), None)
        return cls(source, tuple(sorted({round(o) for o in offsets}))) if source is not None and offsets else None

    async def reaches(self, at: float, tenant: str, deadline_seconds: float) -> tuple[float, ...]:
        """The offsets at which the store holds anything, by one query; none where it does not answer."""
        query = " or ".join(
            f'label_replace({_ANYTHING.format(f"{offset:.0f}")}, "{_LABEL}", "{offset:.0f}", "", "")'
            for offset in self.offsets
        )
        try:
            found, _ = await self.source.query_instant(query, at=at, tenant=tenant, deadline_seconds=deadline_seconds)
        except QueryError:
            return ()  # what else was asked says the same
        there = {sample.labels.get(_LABEL) for sample in found}
        return tuple(offset for offset in self.offsets if f"{offset:.0f}" in there)

    async def of_look(
        self,
        request: EvidenceRequest,
        names: Collection[str],
        offsets: Sequence[float],
        onset: float,
        budget: Budget,
        deadline_seconds: float,
    ) -> tuple[tuple[History, ...], tuple[Evidence, ...]]:
        """What the queries `names` of the look's own request give at each of the offsets, and what was missing."""
        asked = tuple(q for q in request.queries if q.name in names and q.source == self.source.name)
        if not asked or not offsets or deadline_seconds <= 0:
            return (), ()
        begin = max(request.start, onset - BEFORE_SECONDS)
        share = replace(
            budget, series=budget.series // len(offsets), samples=budget.samples // len(offsets), queries=len(asked)
        )
        if len(asked) * len(offsets) > budget.queries:
            asked = asked[: budget.queries // len(offsets)]
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    gather(
                        [self.source],
                        replace(request, queries=asked, start=begin - offset, end=request.end - offset),
                        deadline_seconds,
                        share,
                    )
                )
                for offset in offsets
            ]
        looks = list(zip(offsets, (task.result() for task in tasks), strict=True))
        found = tuple(History(offset, tuple(e for e in look if e.frame.ids)) for offset, look in looks)
        reasons = [f"{e.name} {offset:.0f} s before: {e.missing}" for offset, look in looks for e in look if e.missing]
        missing = bounded(f"{len(reasons)} queries, {reasons[0]}") if reasons else ""
        return (
            tuple(history for history in found if history.evidence),
            (Evidence(NAME, self.source.name, missing=missing),) if missing else (),
        )
