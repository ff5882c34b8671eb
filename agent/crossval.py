"""Cross-validation of diagnosis: how good it is on services and systems that it was not made for.

Called by `alertmedic evaluate --cross`. Every case is observed once; then it is diagnosed twice with likelihoods
counted from other cases only (`rules.learn`): from all but those with the same true service, and from other systems
alone. Sets named in `unlicensed` (no license allows learning from them) are never counted; a cause of which no other
case exists at all keeps its table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from agent.engines import Engine, matched
from agent.evaluate import LIMIT, Case, Ranking, Scored, Truth, read_truth, report, score
from agent.sources.recorded import read_recording
from rules.diagnose import conclude, observe
from rules.evidence import Observer
from rules.learn import Counts, applied, count, learned, shown
from rules.packs import PackSet


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """A case, what it showed, its truth, and the system it was recorded on."""

    case: Case
    observer: Observer
    truth: Truth
    counts: Counts
    system: str


def cross_validate(
    cases: Sequence[Case],
    packs: PackSet,
    progress: Callable[[Case], None] = lambda _: None,
    unlicensed: Collection[str] = (),
    engine: Engine | None = None,
) -> dict[str, Any]:
    """`{"service": report, "system": report}`, as `agent.evaluate.report` gives them. Raises RecordingError."""
    known: list[_Known] = []
    for case in cases:
        observer = matched(observe(read_recording(case.directory), packs), engine)
        truth = read_truth(case.directory)
        counts = count(observer, truth.service, truth.fault)
        known.append(_Known(case, observer, truth, counts, str(truth.extra.get("source", case.set))))
        progress(case)
    total: Counts = Counts()
    for one in known:
        if one.system not in unlicensed:
            total.update(one.counts)
    return {
        "service": report(_diagnosed(known, total, packs, _same_service, unlicensed)),
        "system": report(_diagnosed(known, total, packs, lambda a, b: a.system == b.system, unlicensed)),
    }


def _same_service(a: _Known, b: _Known) -> bool:
    """Whether b gives away a's answer: itself, or another incident of the same service."""
    return a is b or (a.system == b.system and a.truth.service is not None and a.truth.service == b.truth.service)


def _diagnosed(
    known: Sequence[_Known],
    total: Counts,
    packs: PackSet,
    hidden: Callable[[_Known, _Known], bool],
    unlicensed: Collection[str],
) -> list[Scored]:
    causes = shown(total)
    fitted: dict[tuple[int, ...], PackSet] = {}
    scored = []
    for one in known:
        without = tuple(i for i, o in enumerate(known) if o.system not in unlicensed and hidden(one, o))
        if without not in fitted:
            counts = total.copy()
            for i in without:
                counts.subtract(known[i].counts)
            fitted[without] = applied(packs, learned(packs, counts, causes))
        begun = time.perf_counter()
        seen = one.observer
        fresh = Observer(seen.situation, fitted[without], seen.findings, seen.graph, seen.fired)
        ranking = Ranking.of(conclude(fresh, LIMIT))
        scored.append(score(one.case, ranking, one.truth, time.perf_counter() - begun))
    return scored
